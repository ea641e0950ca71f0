"""What stands in front of a picture's tokens: a class or a caption."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import gelu


class LabelEmbedder(nn.Module):
    """A table of labels whose last row stands for none."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def null(self, condition: torch.Tensor) -> torch.Tensor:
        return torch.full_like(condition, self.embedding_table.num_embeddings - 1)

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        if condition.ndim != 1:
            raise ValueError(f"condition of shape {tuple(condition.shape)} must be labels of shape (rows,)")
        last = self.embedding_table.num_embeddings - 1
        if condition.device.type == "cpu" and len(condition) and not 0 <= condition.min() <= condition.max() <= last:
            raise ValueError(f"condition holds labels {condition.min()} to {condition.max()}; valid are 0 to {last}")
        return self.embedding_table(condition)[:, None]


class CaptionEmbedder(nn.Module):
    """Two layers from text features to the model's width, and the features of no caption."""

    def __init__(self, channels: int, length: int, hidden_size: int) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(channels, hidden_size)
        self.uncond_embedding = nn.Parameter(torch.randn(length, channels) * channels**-0.5)

    def null(self, condition: torch.Tensor) -> torch.Tensor:
        return self.uncond_embedding.to(condition.dtype).expand(condition.shape)

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        if condition.ndim != 3 or condition.shape[1:] != self.uncond_embedding.shape:
            length, channels = self.uncond_embedding.shape
            wanted = f"text features of shape (rows, {length}, {channels})"
            raise ValueError(f"condition of shape {tuple(condition.shape)} must be {wanted}")
        return self.cap_proj(condition)


class CaptionProjection(nn.Module):
    """``fc2(gelu(fc1 x))``."""

    def __init__(self, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden_size, bias=False)
        self.fc2 = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.fc2(gelu(self.fc1(features), approximate="tanh"))
