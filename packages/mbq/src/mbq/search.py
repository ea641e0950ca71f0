"""The scales of one layer: a grid search over exponents (section 3.5), SmoothQuant's formula, and clipping."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mbq.activations import Call, InputSums, MicroBatch, Stream, call_again
from mbq.config import MBQConfig
from mbq.fold import LayerScales, folded_state, quantize, quantized_state
from mbq.functional import (
    LossSums,
    channel_scale,
    combine_losses,
    dequantize_weight,
    fake_quantize_activation,
    loss_sums,
    smooth_scale,
)
from mbq.layers import LayerPlan, Site
from mbq.processes import Processes


@dataclass
class Weighting:
    """How errors count in one layer: lambda by kind of site (None: the plain mean), or a weight for each token."""

    by_kind: dict[str, float | None]
    by_token: dict[str, list[Tensor]] | None = None
    """By kind, for each sample (T,)."""


@dataclass(frozen=True)
class Found:
    """The result of one site: its scale (K,), the exponent, and the loss of each candidate."""

    scale: Tensor
    ratio: float
    losses: tuple[float, ...]
    errors: dict[str, float]
    """Mean error over "answer" and "vision" tokens of the chosen scale, and of plain rounding ("rtn answer" ...)."""


class LayerSearch:
    """Everything the search of one layer reads; the layer's parameters are never written."""

    def __init__(
        self,
        plan: LayerPlan,
        full: Stream,
        distorted: Stream | None,
        weighting: Weighting,
        config: MBQConfig,
        processes: Processes,
    ) -> None:
        self.plan, self.full, self.distorted = plan, full, distorted
        self.weighting, self.config, self.processes = weighting, config, processes
        self.modules = [site.inspected for site in plan.sites]
        self.reference = full.run(plan, self.modules)

    @torch.no_grad()
    def run(self) -> tuple[LayerScales, list[Found]]:
        """Search every site on the unmodified layer, or on what the scales found so far leave (`distort`)."""
        layer, found = LayerScales(), []
        for number, site in enumerate(self.plan.sites):
            inputs = self._inputs(number, layer)
            if self.config.method == "smoothquant":
                one = self._smooth(site, inputs)
            else:
                one = self._search(site, inputs)
            layer.scales[number] = one.scale
            found.append(one)
        if self.config.clip == "search":
            layer.clips = self._clips(layer)
        return layer, found

    def _inputs(self, number: int, layer: LayerScales) -> list[MicroBatch]:
        """The calls that candidates are evaluated on; with `distort` those of the quantised stream (section 3.6)."""
        if self.distorted is None:
            return self.reference
        state = quantized_state(self.plan, layer, self.config) if number else None
        return self.distorted.run(self.plan, self.modules, state, self.config.a_bits if number else 16)

    def _sums(self, site: Site, inputs: list[MicroBatch]) -> InputSums:
        sums = InputSums(self.plan.linear(site.linears[0]).in_features)
        for batch in inputs:
            sums.add(batch.calls[site.inspected].hidden)
        sums.total, sums.count = self.processes.sum(sums.total), self.processes.sum(sums.count)
        return sums

    def _smooth(self, site: Site, inputs: list[MicroBatch]) -> Found:
        """SmoothQuant scales what a norm hands on; other sites stay."""
        columns = self.plan.linear(site.linears[0]).in_features
        if site.fold == "rows":
            return Found(torch.ones(columns), 0.0, (), {})
        sums = self._sums(site, inputs)
        largest = self.processes.maximum(sums.largest)
        weights = torch.stack([self.plan.linear(name).weight.float().abs().amax(0).cpu() for name in site.linears])
        return Found(smooth_scale(largest.float(), weights.amax(0)), 0.5, (), {})

    def _search(self, site: Site, inputs: list[MicroBatch]) -> Found:
        mean = site.average(self._sums(site, inputs).mean)
        weight = self.weighting.by_kind[site.kind]
        best, losses, errors = 0, [], []
        for step in range(self.config.grid):
            sums = self._evaluate(site, inputs, channel_scale(mean, step / self.config.grid))
            losses.append(float(combine_losses(sums, weight, self.config.loss)))
            errors.append(
                {
                    "answer": float(sums.answer) / max(sums.answer_count, 1),
                    "vision": float(sums.vision) / max(sums.vision_count, 1),
                }
            )
            # The first of equal losses wins: the smaller exponent.
            if losses[step] < losses[best]:
                best = step
        ratio = best / self.config.grid
        chosen = errors[best] | {f"rtn {name}": value for name, value in errors[0].items()}
        return Found(channel_scale(mean, ratio), ratio, tuple(losses), chosen)

    def _evaluate(self, site: Site, inputs: list[MicroBatch], scale: Tensor) -> LossSums:
        """The error of the inspected module when the site's linear layers are scaled and quantised, all else exact."""
        module = self.plan.module.get_submodule(site.inspected)
        prefix = "" if isinstance(module, nn.Linear) else f"{site.inspected}."
        state = {}
        scale = scale.to(self.plan.device)
        eight = self.config.a_bits == 8
        for name in site.linears:
            linear = self.plan.linear(name)
            weight = linear.weight.float() * scale
            if name in self.plan.linears:
                weight = dequantize_weight(quantize(weight, self.config))
            inner = "weight" if not prefix else f"{name.removeprefix(prefix)}.weight"
            # With quantised inputs the input carries the inverse scale; otherwise the weight takes it back.
            state[inner] = (weight if eight else weight / scale).to(linear.weight)
        total: LossSums | None = None
        for reference, batch in zip(self.reference, inputs, strict=True):
            call = _on(batch.calls[site.inspected], self.plan.device)
            hidden = call.hidden
            if eight:
                hidden = fake_quantize_activation(hidden.float() / scale).to(hidden.dtype)
            output = call_again(module, call, hidden, state)
            sums = loss_sums(
                reference.calls[site.inspected].output.to(output.device),
                output,
                batch.answer.to(output.device),
                batch.vision.to(output.device),
                self.config.loss,
                self._token_weights(site, batch, output.device),
            )
            total = sums if total is None else total.plus(sums)
        assert total is not None
        over_all = self.processes.sum(torch.stack([total.answer, total.vision, total.every]).cpu())
        counts = self.processes.sum(torch.tensor([total.answer_count, total.vision_count, total.every_count]))
        return LossSums(*over_all, *(int(count) for count in counts))

    def _token_weights(self, site: Site, batch: MicroBatch, device: torch.device) -> Tensor | None:
        if self.weighting.by_token is None:
            return None
        return torch.stack([self.weighting.by_token[site.kind][number] for number in batch.samples]).to(device)

    def _clips(self, layer: LayerScales) -> dict[str, Tensor]:
        """For each group of each linear layer, the share of its range that leaves the least squared output error.

        As AWQ does it, on the inputs after scaling; queries and keys stay whole, since their product is not linear.
        """
        products = ("q_proj", "k_proj", "qkv_proj", "in_proj_qkv")
        names = [name for name in self.plan.linears if not name.endswith(products)]
        folded = folded_state(self.plan, layer.scales)
        parameters = dict(self.plan.module.named_parameters())
        scaled = self.full.run(self.plan, names, {name: value.to(parameters[name]) for name, value in folded.items()})
        clips = {}
        for name in names:
            weight = folded.get(f"{name}.weight", self.plan.linear(name).weight.detach().float())
            size = weight.shape[1] if self.config.group_size == -1 else self.config.group_size
            moments = torch.zeros(weight.shape[1] // size, size, size, dtype=torch.float64)
            for batch in scaled:
                grouped = batch.calls[name].hidden.float().reshape(-1, weight.shape[1] // size, size).transpose(0, 1)
                moments += (grouped.transpose(1, 2) @ grouped).double()
            moments = self.processes.sum(moments).float().to(weight.device)
            clips[name] = best_clip(weight, moments, self.config)
        return clips


def best_clip(weight: Tensor, moments: Tensor, config: MBQConfig) -> Tensor:
    """Return shares (N, G) in 0.5 to 1 of each group's range; moments (G, g, g) are sums of x x^T of its inputs."""
    rows, groups = weight.shape[0], moments.shape[0]
    best = torch.full((rows, groups), torch.inf, device=weight.device)
    shares = torch.ones(rows, groups, device=weight.device)
    for step in range(10):
        share = torch.full((rows, groups), 1 - step / 20, device=weight.device)
        error = (weight - dequantize_weight(quantize(weight, config, share))).view(rows, groups, -1)
        loss = torch.einsum("ngi,gij,ngj->ng", error, moments, error)
        better = loss < best
        best, shares = torch.where(better, loss, best), torch.where(better, share, shares)
    return shares


def _on(call: Call, device: torch.device) -> Call:
    """The call with its hidden states on `device`; other arguments are there already."""
    return Call(call.hidden.to(device), call.arguments, call.output, call.positional)
