"""The mathematics of speculative Jacobi decoding as tensor functions: no model, no cache, no state."""

from sjd.functional.acceptance import StepResult, accept_lengths, expected_ratio, residual_probs, window_step
from sjd.functional.drafts import initial_drafts
from sjd.functional.processing import process_rows
from sjd.functional.randomness import gumbel, inverse_cdf

__all__ = [
    "StepResult",
    "accept_lengths",
    "expected_ratio",
    "gumbel",
    "initial_drafts",
    "inverse_cdf",
    "process_rows",
    "residual_probs",
    "window_step",
]
