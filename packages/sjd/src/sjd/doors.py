"""What answers `generate` on a model that sjd is applied to: transformers', Janus' own, and LlamaGen's."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pared_hooks import ConfigError
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList

from sjd.adapters.base import Inputs, check_padding, one_size
from sjd.adapters.janus import without_words
from sjd.adapters.llamagen import LlamaGen
from sjd.decode import (
    check_config,
    check_generation_mode,
    check_length,
    decode,
    processors_of,
    resolve_grammar,
    warn_of_top_k,
)
from sjd.engine import Engine, Request
from sjd.processing import Guidance, Processing
from sjd.progress import ProgressCallback, reporter
from sjd.session import Session

Door = Callable[..., Any]
JANUS_GUIDANCE = 5.0


def door_of(session: Session, model: Any) -> Door:
    """The wrapper `(original, *args, **kwargs)` of this model's `generate`."""
    name = session.adapter.name
    if name == "janus":
        return functools.partial(_janus, session, model)
    if name == "llamagen":
        return functools.partial(_llamagen, session)
    return functools.partial(_transformers, session)


def _transformers(session: Session, original: Door, *args: Any, **kwargs: Any) -> Any:
    """`GenerationMixin.generate` with `decode` as its decoding method."""
    if kwargs.get("custom_generate") is not None:
        return original(*args, **kwargs)
    if kwargs.get("assistant_model") is not None:
        raise ConfigError("assistant_model is not valid with sjd: the model drafts for itself", "assistant_model")
    if kwargs.get("pixel_values") is None and (sizes := kwargs.pop("image_sizes", None)) is not None:
        # Sizes without images are those of what is to be drawn (Emu3).
        kwargs.setdefault("image_grid", one_size(sizes))
    # `generate` puts the prompt into the streamer, and does not hand it on.
    kwargs.setdefault("token_streamer", kwargs.get("streamer"))
    return original(*args, custom_generate=functools.partial(decode, sjd_session=session), **kwargs)


@torch.no_grad()
def _janus(
    session: Session,
    model: Any,
    original: Door,
    inputs: Tensor | None = None,
    attention_mask: Tensor | None = None,
    logits_processor: Any = None,
    **kwargs: Any,
) -> Any:
    """`JanusForConditionalGeneration.generate(generation_mode="image")`; text is left to the model."""
    if kwargs.get("generation_mode", "text") != "image":
        return original(inputs, attention_mask, logits_processor, **kwargs)
    kwargs.pop("generation_mode")
    generator, callback = kwargs.pop("generator", None), kwargs.pop("progress_callback", None)
    streamer, grammar_choice = kwargs.pop("streamer", None), kwargs.pop("sjd_grammar", "auto")
    streamer = kwargs.pop("token_streamer", streamer)
    config, model_kwargs = model._prepare_generation_config(kwargs.pop("generation_config", None), **kwargs)
    config.validate()
    model._validate_model_kwargs(model_kwargs.copy())
    if config.guidance_scale is None:
        warnings.warn(f"guidance_scale is None; Janus draws with {JANUS_GUIDANCE}", stacklevel=3)
    scale = JANUS_GUIDANCE if config.guidance_scale is None else float(config.guidance_scale)
    config.guidance_scale = None
    ids, _, model_kwargs = model._prepare_model_inputs(inputs, config.bos_token_id, model_kwargs)
    model._prepare_special_tokens(config, attention_mask is not None, device=ids.device)
    processors = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=ids.shape[1],
        encoder_input_ids=ids,
        logits_processor=LogitsProcessorList() if logits_processor is None else logits_processor,
        device=ids.device,
    )
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    ids, expanded = model._expand_inputs_for_generation(
        input_ids=ids, attention_mask=mask, expand_size=config.num_return_sequences or 1
    )
    check_generation_mode(config, streamer, len(ids))
    adapter = session.adapter
    asked = Inputs(ids, check_padding(expanded["attention_mask"].to(torch.bool)))
    processing = Processing.of(processors)
    grammar = resolve_grammar(adapter, asked, grammar_choice, model.model.vision_model.config.num_image_tokens)
    check_config(session.config, grammar, bool(config.do_sample), len(ids))
    warn_of_top_k(config, processing, grammar)
    prompts = [adapter.prompt(asked)]
    if scale != 1:
        processing.guidance = Guidance(scale)
        prompts.append(adapter.prompt(without_words(asked, config)))
    check_length(adapter, prompts, grammar)
    request = Request(
        prompts, grammar, processing, bool(config.do_sample), ids,
        generator=generator, on_pass=reporter(callback, streamer),
    )  # fmt: skip
    tokens, _ = session.run(request)
    if config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=tokens)
    return tokens


@torch.no_grad()
def _llamagen(
    session: Session,
    original: Door,
    condition: Tensor,
    condition_mask: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    do_sample: bool = True,
    logits_processor: Any = None,
    progress_callback: ProgressCallback | None = None,
) -> Tensor:
    """`LlamaGenTransformer.generate`: tokens (B, grid cells) for a condition, the null condition guiding."""
    adapter = session.adapter
    assert isinstance(adapter, LlamaGen)
    if not guidance_scale >= 0:
        raise ConfigError(f"guidance_scale = {guidance_scale} is not valid: at least 0", "guidance_scale")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p = {top_p} is not valid: above 0, at most 1", "top_p")
    processors = LogitsProcessorList(logits_processor or [])
    processors.extend(processors_of(temperature, top_k, top_p))
    request = llamagen_request(
        adapter,
        condition,
        condition_mask,
        Processing.of(processors),
        guidance_scale=guidance_scale,
        do_sample=do_sample,
        generator=generator,
        on_pass=reporter(progress_callback, None),
    )
    check_config(session.config, request.grammar, do_sample, len(condition))
    return session.run(request)[0]


def llamagen_request(
    adapter: LlamaGen,
    condition: Tensor,
    condition_mask: Tensor | None,
    processing: Processing,
    *,
    guidance_scale: float = 1.0,
    do_sample: bool = True,
    generator: torch.Generator | None = None,
    on_pass: Callable[[Engine], None] | None = None,
) -> Request:
    """What an engine needs to draw for a condition (B, ...) with its mask (B, prefix) of words."""
    prompts = [adapter.condition(condition, condition_mask)]
    if guidance_scale != 1:
        processing.guidance = Guidance(float(guidance_scale))
        # The null rows keep the mask of their conditional rows, as the model was trained.
        prompts.append(adapter.condition(adapter.model.null_condition(condition), condition_mask))
    nothing = torch.empty(len(condition), 0, dtype=torch.int64, device=prompts[0].embeds.device)
    return Request(
        prompts, adapter.grammar(), processing, do_sample, nothing, generator=generator, on_pass=on_pass
    )  # fmt: skip
