"""What `pared demo mbq` runs: a transform codec of two linear layers, at fewer and fewer bits."""

from __future__ import annotations

import torch
from pared_bench import DemoContext, DemoResult, Figure, Table, quality
from pared_zoo import world
from torch import Tensor, nn

from mbq.apply import applied
from mbq.config import NEUTRAL_BITS, MbqConfig

PATCH = 8


class TransformCodec(nn.Module):
    """An orthogonal transform of 8 x 8 patches and its inverse: exact, as long as nothing is rounded in between."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        size = 3 * PATCH * PATCH
        basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
        self.analysis = nn.Linear(size, size, bias=False)
        self.synthesis = nn.Linear(size, size, bias=False)
        with torch.no_grad():
            self.analysis.weight.copy_(basis.T)
            self.synthesis.weight.copy_(basis)

    def forward(self, images: Tensor) -> Tensor:
        """Return the images after transform and inverse; (batch, 3, height, width) in [-1, 1] both ways."""
        patches = nn.functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        patches = self.synthesis(self.analysis(patches)).transpose(1, 2)
        return nn.functional.fold(patches, images.shape[-2:], PATCH, stride=PATCH)


def pictures(count: int, seed: int, size: int = 64) -> Tensor:
    """Return pictures of the zoo's world, (count, 3, size, size) in [-1, 1]."""
    pixels = torch.from_numpy(world.render(world.sample_scenes(count, seed=seed), size))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def mean_psnr(images: Tensor, reference: Tensor) -> float:
    """Return the mean peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return float(quality.psnr(images, reference, data_range=2).mean())


def sheet(rows: list[Tensor]) -> Figure:
    """Return the pictures as one figure, one row for each tensor of (count, 3, height, width)."""
    grid = torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2)
    pixels = ((grid.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Figure.from_image("Pictures", pixels.cpu().numpy(), "One row for each row of the table, plain on top.")


@torch.no_grad()
def run(context: DemoContext, *, bits: int = 4) -> DemoResult:
    """Show pictures after the codec, plain and rounded to several numbers of bits, `bits` among them."""
    model = TransformCodec(torch.Generator().manual_seed(context.seed)).to(context.device)
    images = pictures(6, context.seed).to(context.device)
    rows, cells, metrics = [], [], {}
    for number in context.track(sorted({NEUTRAL_BITS, 8, bits, 3}, reverse=True), "rounding"):
        with applied(model, MbqConfig(bits=number, skip=("synthesis",))) as handle:
            output = model(images)
            error = handle.stats()["relative_error"]
        rows.append(output)
        metrics[f"psnr_{number}_bits"] = mean_psnr(output, images)
        cells.append((number, metrics[f"psnr_{number}_bits"], 100 * error))
    columns = ["bits", "PSNR [dB]", "relative error [%]"]
    return DemoResult(
        title="Fewer bits between two layers",
        summary="A picture goes through an orthogonal transform and back; its coefficients are rounded in between.",
        tables=[Table("Quality by bits", columns, cells, "32 bits is the plain model.")],
        figures=[sheet(rows)],
        metrics=metrics,
    )
