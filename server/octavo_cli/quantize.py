"""`octavo quantize`: make a model smaller and say what it cost."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from octavo_engine.quantize.report import QuantizationReport

PHASES = {
    "resolve": "Find the model",
    "load": "Read weights",
    "before": "Perplexity before",
    "quantize": "Quantize layers",
    "after": "Perplexity after",
    "write": "Write checkpoint",
}


class FormatChoice(enum.StrEnum):
    """The engine's formats."""

    COMPRESSED_TENSORS = "compressed-tensors"
    GPTQ = "gptq"


class MethodChoice(enum.StrEnum):
    """The engine's methods, repeated so that `--help` needs no torch."""

    RTN = "rtn"
    GPTQ = "gptq"
    AWQ = "awq"
    AWQ_GPTQ = "awq-gptq"
    SMOOTHQUANT = "smoothquant"


def quantize(
    model: Annotated[str, typer.Argument(help="A path or storage URI: file, pypi, hf, https or pvc.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the checkpoint.")],
    method: Annotated[
        MethodChoice, typer.Option(help="How to round. smoothquant makes W8A8, the others weights only.")
    ] = MethodChoice.AWQ_GPTQ,
    bits: Annotated[int | None, typer.Option(help="4 or 8; smoothquant takes 8.")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale; 0: a whole row. Left out: 32 for small models, else the largest of 128, "
            "64 and 32 that fits."
        ),
    ] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="4 bits with zero points: more exact, but fewer programs read it.")
    ] = False,
    layout: Annotated[
        FormatChoice, typer.Option("--format", help="compressed-tensors holds everything, gptq only 4-bit weights.")
    ] = FormatChoice.COMPRESSED_TENSORS,
    calibration: Annotated[
        Path | None, typer.Option(help="UTF-8 text like what the model will see; a short mixed text if left out.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="UTF-8 text to measure perplexity on; another short text if left out.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, max=4096, help="Pieces of calibration text to use, at most.")] = 64,
    window_tokens: Annotated[int, typer.Option(min=64, max=32768, help="Tokens in a piece.")] = 512,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Keep layers whose name contains this; may be repeated.")
    ] = None,
    sensitive: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=0.99,
            help="Share of the weights, those 4 bits hurt most, to keep in 8. Left out: 0.3 of small models.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Version or Git revision of the model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Quantize a model after training and write a standard checkpoint.

    The result is in the compressed-tensors format, which Octavo, vLLM and transformers read, or in that of GPTQ. The
    report gives size and perplexity before and after; it is also kept beside the weights.
    """
    import msgspec

    from octavo_engine.errors import OctavoError
    from octavo_engine.quantize.layout import Format
    from octavo_engine.quantize.pipeline import QuantizeOptions, quantize_model
    from octavo_engine.quantize.scheme import Method

    options = QuantizeOptions(
        model=model,
        output=output,
        method=Method(method.value),
        bits=bits or (8 if method is MethodChoice.SMOOTHQUANT else 4),
        group_size=group_size,
        symmetric=not asymmetric,
        format=Format(layout.value),
        calibration=calibration,
        evaluation=evaluation,
        num_windows=windows,
        window_tokens=window_tokens,
        ignore=tuple(ignore or ()),
        sensitive_share=sensitive,
        device=device,
        revision=revision,
    )
    try:
        with _Bars() as bars:
            report = quantize_model(options, bars.show)
    except OctavoError as error:
        typer.echo(f"octavo quantize: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo("octavo quantize: stopped; nothing was written", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
    else:
        _print(report)


class _Bars:
    """One progress bar a phase, on stderr."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, phase: str, fraction: float, detail: str) -> None:
        """Move a phase's bar."""
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(PHASES[phase], total=1.0, detail=detail)
        self._progress.update(self._tasks[phase], completed=fraction, detail=detail)


def _print(report: QuantizationReport) -> None:
    table = Table(title=f"{report.method} {report.scheme}: {report.output}", title_justify="left")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    mib, error = 1 << 20, report.perplexity_change_error
    table.add_row(
        "weights",
        f"{report.weight_bytes_before / mib:.1f} MiB",
        f"{report.weight_bytes_after / mib:.1f} MiB",
        f"{report.weight_bytes_after / report.weight_bytes_before - 1:+.1%}",
    )
    table.add_row(
        "perplexity",
        f"{report.perplexity_before:.3f}",
        f"{report.perplexity_after:.3f}",
        f"{report.perplexity_change:+.2%}" + ("" if error is None else f" ± {error:.2%}"),
    )
    console = Console()
    console.print(table)
    console.print(
        f"{report.num_quantized} projections, {report.num_in_8_bits} of them kept in 8 bits; "
        f"{report.calibration_tokens} calibration tokens, perplexity on {report.evaluation_tokens} other tokens; "
        f"{report.seconds:.0f} s, {report.peak_memory_bytes / 2**30:.1f} GiB memory at most"
    )
    console.print(f"Serve it: octavo serve {report.output}")
