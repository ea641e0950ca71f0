"""A recipe that trains in a second, for the tests of the trainer."""

import torch
from pared_zoo.recipes import Recipe, Schedule


class Line(Recipe):
    """A line fitted to noisy points."""

    name = "line"
    schedules = {"small": Schedule(steps=12, batch_size=8, learning_rate=0.1, warmup=2, ema_decay=0.5)}  # noqa: RUF012
    interrupt_at: int | None = None

    def build(self):
        torch.manual_seed(self.seed_of(0))
        return torch.nn.Linear(3, 1)

    def batch(self, step, rank, size):
        if step == self.interrupt_at:
            raise KeyboardInterrupt
        x = torch.randn(size, 3, generator=torch.Generator().manual_seed(self.seed_of(1, step, rank)))
        return {"x": x, "y": x.sum(1, keepdim=True)}

    def loss(self, module, batch, generator):
        noise = 0.01 * torch.randn(batch["y"].shape, generator=generator)
        return {"loss": (module(batch["x"]) - batch["y"] - noise).square().mean()}

    def save(self, module, folder):
        torch.save(module.state_dict(), folder / "line.pt")

    def evaluate(self, folder, device, track):
        weight = torch.load(folder / "line.pt", weights_only=True)["weight"]
        return {"distance": (weight - 1).abs().max().item()}

    @staticmethod
    def load(folder):
        return torch.load(folder / "line.pt", weights_only=True)
