"""The mathematics of FrameFusion as functions of tensors: no model in it. Inputs are never modified."""

from __future__ import annotations

from framefusion.functional.budget import required_sparsity
from framefusion.functional.controller import Controller
from framefusion.functional.merging import MergeChoice, Merged, choose_merges, merge
from framefusion.functional.pruning import choose_kept, last_query_importance
from framefusion.functional.similarity import adjacent_similarity, predecessor

__all__ = [
    "Controller",
    "MergeChoice",
    "Merged",
    "adjacent_similarity",
    "choose_kept",
    "choose_merges",
    "last_query_importance",
    "merge",
    "predecessor",
    "required_sparsity",
]
