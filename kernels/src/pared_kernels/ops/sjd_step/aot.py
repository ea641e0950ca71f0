"""What is compiled ahead of time for `sjd_step`."""

from __future__ import annotations

from collections.abc import Iterator

from ...aot import Specialization
from .triton import commit_constants, commit_kernel, constants, test_kernel


def kernels() -> Iterator[Specialization]:
    """Yield both kernels for image columns and whole vocabularies, both rules, with and without a threshold."""
    strides = dict.fromkeys(
        ("stride_logits_batch", "stride_logits", "stride_previous_batch", "stride_previous"), "i32"
    )  # fmt: skip
    longs = dict.fromkeys(("draft_ptr", "source_ptr", "forced_ptr", "resampled_ptr", "fresh_ptr"), "*i64")
    types = {
        **longs, **strides, "previous_ptr": "*fp32", "u_accept_ptr": "*fp32", "u_sample_ptr": "*fp64",
        "threshold_ptr": "*fp32", "valid_ptr": "*u8", "probs_ptr": "*fp32", "accepted_ptr": "*u8", "columns": "i32",
        "window": "i32", "temperature": "fp32",
    }  # fmt: skip
    aligned = ("logits_ptr", "previous_ptr", "probs_ptr", "columns", "stride_logits", "stride_previous")
    for dtype in ("fp16", "bf16", "fp32"):
        for columns, threshold, maximal in ((8192, True, True), (65536, True, True), (8192, False, False)):
            chosen, options = constants(columns, threshold, maximal)
            label = f"{dtype} V{columns}{' threshold' if threshold else ''}{' maximal' if maximal else ''}"
            yield Specialization(
                test_kernel, label, types | {"logits_ptr": f"*{dtype}"}, chosen, options, aligned=aligned
            )  # fmt: skip
    for window, maximal in ((15, False), (63, True)):
        chosen, options = commit_constants(window, maximal)
        pointers = dict.fromkeys(
            ("draft_ptr", "resampled_ptr", "fresh_ptr", "limit_ptr", "tokens_ptr", "committed_ptr"), "*i64"
        )
        yield Specialization(
            commit_kernel,
            f"W{window}{' maximal' if maximal else ''}",
            pointers | {"accepted_ptr": "*u8", "window": "i32"},
            chosen,
            options,
            aligned=("draft_ptr", "tokens_ptr"),
        )
