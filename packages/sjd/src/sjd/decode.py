"""`decode`: the door for `generate(custom_generate=sjd.decode)`."""

from __future__ import annotations

import warnings
from types import NoneType
from typing import Any, Literal

import torch
from pared_hooks import ConfigError
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.logits_process import LogitsProcessorList

from sjd.adapters.base import Adapter, Inputs, Prompt, check_padding
from sjd.config import SJDConfig
from sjd.engine import Request
from sjd.errors import GrammarError
from sjd.functional.drafts import WITHOUT_GRID
from sjd.grammar import ImageGrammar
from sjd.processing import Processing
from sjd.progress import ProgressCallback, reporter
from sjd.session import Session

HANDLED = ("MaxLengthCriteria", "EosTokenCriteria")


@torch.no_grad()
def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    *,
    sjd_config: SJDConfig | None = None,
    sjd_grammar: ImageGrammar | Literal["auto", "off"] = "auto",
    sjd_session: Session | None = None,
    image_grid: tuple[int, int] | None = None,
    generator: torch.Generator | None = None,
    token_streamer: Any = None,
    progress_callback: ProgressCallback | None = None,
    **model_kwargs: Any,
) -> Any:
    """Generate with speculative Jacobi decoding; the tokens have the law of plain sampling with the same processors.

    Pass it to a model of transformers: `model.generate(..., custom_generate=sjd.decode, sjd_config=...)`. The arguments
    up to `generation_config`, and `model_kwargs`, come from `generate`. Yours are:

    Args:
        sjd_config: options of the method.
        sjd_grammar: layout of the answer; "auto" is the model's own, "off" allows any token anywhere.
        image_grid: (height, width) of the image in tokens, where the model draws several sizes.
        generator: source of all random numbers; None is torch's own.
        token_streamer: a streamer of transformers; gets final tokens alone, for one row.
        progress_callback: called with a `Progress` after every pass.

    Returns:
        (B, prompt + new tokens) int64, rows that ended early padded; or a `GenerateDecoderOnlyOutput` with it.

    Raises:
        ValueError: for beams, assistants, penalties, prompts padded on the right, an answer that does not fit
            max_new_tokens or the model, and other arguments that cannot be met; `GrammarError` among them.
        RuntimeError: for logits that are not finite, naming row and position.
    """
    session = Session(model, sjd_config) if sjd_session is None else sjd_session
    config, adapter = session.config, session.adapter
    check_generation_mode(generation_config, token_streamer, len(input_ids))
    _check_arguments(generation_config, model_kwargs)
    do_sample = bool(generation_config.do_sample)
    # transformers lets a prompt stay on the CPU.
    ids = input_ids.to(adapter.device)
    mask = model_kwargs.pop("attention_mask", None)
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device, torch.bool)
    new_tokens = generation_config.max_length - ids.shape[1]
    inputs = Inputs(ids, check_padding(mask), model_kwargs, image_grid, new_tokens)
    processing = Processing.of(logits_processor)
    grammar = resolve_grammar(adapter, inputs, sjd_grammar, new_tokens)
    check_config(config, grammar, do_sample, len(input_ids))
    warn_of_top_k(generation_config, processing, grammar)
    prompts = [adapter.prompt(inputs)]
    if processing.guidance is not None:
        prompts.append(adapter.prompt(_unconditional(adapter, inputs, processing)))
    check_length(adapter, prompts, grammar)
    pad, eos = _ids(generation_config.pad_token_id), _ids(generation_config.eos_token_id)
    request = Request(
        prompts=prompts,
        grammar=grammar,
        processing=processing,
        do_sample=do_sample,
        prompt_ids=ids,
        eos=eos,
        criteria=[one for one in stopping_criteria or () if type(one).__name__ not in HANDLED],
        generator=generator,
        on_pass=reporter(progress_callback, token_streamer),
    )
    tokens, lengths = session.run(request)
    longest = int(lengths.max()) if len(lengths) else 0
    behind = torch.arange(longest, device=tokens.device) >= lengths[:, None]
    tokens = tokens[:, :longest].masked_fill(behind, pad[0] if pad else (eos[0] if eos else 0))
    sequences = torch.cat((input_ids, tokens.to(input_ids)), 1)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences)
    return sequences


def resolve_grammar(
    adapter: Adapter, inputs: Inputs, choice: ImageGrammar | Literal["auto", "off"], new_tokens: int
) -> ImageGrammar:
    """The layout of the answer. Raises `ConfigError` where it does not fit `new_tokens`, naming both numbers."""
    if isinstance(choice, ImageGrammar):
        grammar: ImageGrammar | None = choice
    elif choice == "auto":
        grammar = adapter.grammar(inputs)
    elif choice == "off":
        grammar = None
    else:
        raise GrammarError(f"sjd_grammar = {choice!r} is not valid: an ImageGrammar, 'auto' or 'off'")
    if grammar is None:
        return ImageGrammar.free(new_tokens)
    if new_tokens < grammar.length:
        raise ConfigError(
            f"max_new_tokens = {new_tokens} is less than the {grammar.length} tokens of the image", "max_new_tokens"
        )
    return grammar


def check_config(config: SJDConfig, grammar: ImageGrammar, do_sample: bool, rows: int) -> None:
    """Raise for options that do not go together with this request, and warn about lossy ones."""
    if config.verify == "match" and do_sample and config.refresh != "gumbel":
        raise ConfigError(
            f"SJDConfig.refresh = {config.refresh!r} is not valid: 'gumbel' when verify='match' samples", "refresh"
        )
    if not grammar.has_grid and config.init not in WITHOUT_GRID:
        raise GrammarError(
            f"SJDConfig.init = {config.init!r} needs a grid of image cells; valid here: {', '.join(WITHOUT_GRID)}"
        )
    if config.cache == "dynamic" and rows != 1:
        raise ConfigError(f"SJDConfig.cache = 'dynamic' is not valid for {rows} rows: 'ragged'", "cache")
    if config.backend == "triton" and not torch.cuda.is_available():
        raise RuntimeError("SJDConfig.backend = 'triton' needs a GPU; valid here: 'auto' or 'torch'")
    if config.relax:
        warnings.warn(f"relax = {config.relax}: the output distribution changes", stacklevel=3)


def check_length(adapter: Adapter, prompts: list[Prompt], grammar: ImageGrammar) -> None:
    """Raise `ConfigError` where prompt and answer reach beyond the model's positions, naming both numbers."""
    longest = max(prompt.embeds.shape[1] for prompt in prompts) + grammar.length
    limit = adapter.max_positions
    if limit is not None and longest > limit:
        raise ConfigError(
            f"prompt and answer take {longest} positions; the model has max_position_embeddings = {limit}",
            "max_new_tokens",
        )


def warn_of_top_k(generation_config: Any, processing: Processing, grammar: ImageGrammar) -> None:
    """Warn when an image is sampled with the top-k that transformers has for text."""
    if grammar.has_grid and generation_config.top_k == 50 and _has_top_k(processing):
        warnings.warn(
            "generation_config.top_k = 50, the default of transformers, narrows what an image model draws; set it to "
            "what the model was made for (1000 to 2000), or to 0",
            stacklevel=3,
        )


def check_generation_mode(generation_config: Any, streamer: Any, rows: int) -> None:
    """Raise `ConfigError` for anything but sampling or greedy search of tokens alone, streamed for one row at most."""
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise ConfigError(
            f"generation mode {mode.value!r} (num_beams {generation_config.num_beams}) is not valid with sjd: sampling "
            "or greedy search, without num_beams, assistant_model, prompt_lookup_num_tokens or penalty_alpha",
            "num_beams",
        )
    if getattr(generation_config, "penalty_alpha", None):
        raise ConfigError(
            f"penalty_alpha = {generation_config.penalty_alpha} is not valid with sjd: leave it out", "penalty_alpha"
        )
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(generation_config, name, False):
            raise ConfigError(f"{name} = True is not valid with sjd: windows hold guesses; use sequences alone", name)
    if streamer is not None and rows != 1:
        raise ConfigError(f"token_streamer takes one row, there are {rows}", "token_streamer")


def _check_arguments(generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    cache = model_kwargs.pop("past_key_values", None)
    if cache is not None and cache.get_seq_length() > 0:
        raise ConfigError(
            "past_key_values holds tokens already; valid with sjd: None or an empty cache", "past_key_values"
        )
    # What `generate` makes unless told otherwise is made anew here, with rows of their own length.
    plain = type(cache) in (NoneType, DynamicCache, StaticCache)
    if not plain or generation_config.cache_implementation == "quantized":
        kind = type(cache).__name__ if cache is not None else "a quantised cache"
        raise ConfigError(
            f"{kind} cannot take rejected drafts back; valid with sjd: no past_key_values, no cache_implementation or "
            "'static'",
            "past_key_values",
        )
    if model_kwargs.get("inputs_embeds") is not None:
        raise ConfigError("inputs_embeds is not valid with sjd: input_ids", "inputs_embeds")


def _unconditional(adapter: Adapter, inputs: Inputs, processing: Processing) -> Inputs:
    guidance = processing.guidance
    assert guidance is not None
    if guidance.ids is None:
        return adapter.uncond(inputs)
    rows = len(inputs.ids)
    if len(guidance.ids) not in (1, rows):
        raise ConfigError(
            f"negative_prompt_ids has {len(guidance.ids)} rows; valid: 1 or {rows}", "negative_prompt_ids"
        )
    name, mask = "negative_prompt_attention_mask", guidance.mask
    if mask is None:
        mask = torch.ones_like(guidance.ids)
    elif mask.shape != guidance.ids.shape:
        raise ConfigError(f"{name} of shape {tuple(mask.shape)} is not valid: {tuple(guidance.ids.shape)}", name)
    ids, mask = (one.to(inputs.ids.device).expand(rows, -1) for one in (guidance.ids, mask))
    return Inputs(ids, check_padding(mask.to(torch.bool), name))


def _has_top_k(processing: Processing) -> bool:
    return processing.top_k == 50 or any(getattr(one, "top_k", None) == 50 for one in processing.others)


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(one) for one in value] if isinstance(value, (list, tuple)) else [int(value)]


def processors_of(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    """The list that `generate` makes of these three."""
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    found = LogitsProcessorList()
    if temperature != 1:
        found.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        found.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        found.append(TopPLogitsWarper(top_p))
    return found
