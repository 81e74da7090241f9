"""`octavo simulate`: what a scaling policy would cost and miss on a trace, beside the laws of other systems."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from octavo_operator.api.errors import ManifestErrors
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.manifest import load_manifests
from octavo_operator.autoscale import workload
from octavo_operator.autoscale.laws import OctavoLaw, all_laws
from octavo_operator.autoscale.plane import plane
from octavo_operator.autoscale.policy import ScalingPolicy, policy_of
from octavo_operator.autoscale.simulate import Hardware, Law, Report, simulate
from octavo_operator.autoscale.workload import Arrival

BARS = " ▁▂▃▄▅▆▇█"
BAD_INPUT = 2
TITLE = "{} requests: replica-hours, share of first tokens in time, missed, 95th percentile of the wait, reversals"


class Trace(enum.StrEnum):
    """The built-in traces."""

    STEADY = "steady"
    STEP = "step"
    BURSTY = "bursty"
    DIURNAL = "diurnal"


def simulate_command(
    manifest: Annotated[
        Path | None, typer.Option("--file", "-f", help="InferenceService whose autoscaling is judged.")
    ] = None,
    trace: Annotated[Trace, typer.Option(help="Built-in trace.")] = Trace.DIURNAL,
    recorded: Annotated[
        Path | None, typer.Option(help="CSV with time, input_tokens, output_tokens; replaces the trace.")
    ] = None,
    low: Annotated[float, typer.Option(min=0.01, help="Requests per second at the quietest time.")] = 1.0,
    high: Annotated[float, typer.Option(min=0.01, help="Requests per second at the busiest time.")] = 20.0,
    duration: Annotated[float, typer.Option(min=60, help="Seconds of the trace.")] = 3_600.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same trace.")] = 1,
    cold_start: Annotated[float, typer.Option(min=0, help="Seconds until a new replica is ready.")] = 150.0,
    kv_tokens: Annotated[int, typer.Option(min=1_000, help="Tokens that one replica's KV cache holds.")] = 60_000,
    slo_ttft: Annotated[float, typer.Option(min=0.1, help="Seconds within which the first token shall come.")] = 2.0,
    peers: Annotated[bool, typer.Option(help="Also play the laws of other systems.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw cost against missed requests as SVG.")] = None,
) -> None:
    """Play an arrival trace against scaling laws and compare cost and service.

    The model of an engine is simple (no prefix reuse, no network, no failures): it ranks laws, and predicts nothing.
    """
    policy = _policy(manifest)
    hardware = Hardware(
        kv_tokens=kv_tokens,
        cold_start_s=cold_start,
        min_replicas=max(policy.min_replicas, 1),
        max_replicas=policy.max_replicas,
        max_num_seqs=policy.max_num_seqs,
    )
    arrivals = _recorded(recorded) if recorded else _trace(trace, low, high, duration, seed)
    laws: list[Law] = [OctavoLaw(policy), *(all_laws(hardware)[1:] if peers else [])]
    reports = [simulate(law, arrivals, hardware, slo_ttft) for law in laws]
    if plot:
        points = {report.law: [(report.replica_hours, 1 - report.slo_met)] for report in reports}
        plot.write_text(plane(points, f"{reports[0].requests} requests, cold start {cold_start:g} s"))
    if as_json:
        typer.echo(json.dumps([_document(report) for report in reports], indent=2))
    else:
        Console().print(_table(reports, slo_ttft))


def _policy(manifest: Path | None) -> ScalingPolicy:
    if manifest is None:
        return ScalingPolicy(min_replicas=1, max_replicas=20)
    try:
        resources = load_manifests([manifest], local=True)
    except ManifestErrors as wrong:
        for error in wrong.errors:
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from wrong
    service = next((r for r in resources if isinstance(r, InferenceService)), None)
    policy = policy_of(service.spec) if service else None
    if policy is None or not policy.scales:
        typer.echo(f"error: {manifest}: spec.autoscaling: there is nothing to judge", err=True)
        raise typer.Exit(BAD_INPUT)
    return replace(policy, schedules=())


def _trace(trace: Trace, low: float, high: float, duration: float, seed: int) -> list[Arrival]:
    match trace:
        case Trace.STEADY:
            return workload.steady(high, duration, seed)
        case Trace.STEP:
            return workload.step(low, high, duration, seed)
        case Trace.BURSTY:
            return workload.bursty(low, high, duration, seed)
        case Trace.DIURNAL:
            return workload.diurnal(low, high, duration, seed)


def _recorded(path: Path) -> list[Arrival]:
    try:
        with path.open() as lines:
            return sorted(workload.recorded(lines), key=lambda arrival: arrival.time)
    except (OSError, ValueError) as error:
        typer.echo(f"error: {path}: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from error


def _table(reports: Sequence[Report], slo_ttft: float) -> Table:
    title = TITLE.format(reports[0].requests)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("law", no_wrap=True)
    for column in ("hours", f"TTFT≤{slo_ttft:g}s", "missed", "p95", "turns", "peak"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("replicas", no_wrap=True)
    for report in reports:
        table.add_row(
            report.law,
            f"{report.replica_hours:.2f}",
            f"{report.slo_met:.1%}",
            str(report.slo_misses),
            f"{report.wait_p95_s:.0f} s" if math.isfinite(report.wait_p95_s) else "never",
            str(report.reversals),
            str(report.peak_replicas),
            sparkline([wanted for _, wanted, _ in report.timeline]),
        )
    return table


def sparkline(values: Sequence[int], width: int = 16) -> str:
    """The values as a line of bars; each bar is the largest of its share."""
    if not values:
        return ""
    size = max(1, math.ceil(len(values) / width))
    peaks = [max(values[i : i + size]) for i in range(0, len(values), size)]
    top = max(max(peaks), 1)
    return "".join(BARS[round(peak / top * (len(BARS) - 1))] for peak in peaks)


def _document(report: Report) -> dict[str, Any]:
    document = asdict(report)
    document["wait_p95_s"] = report.wait_p95_s if math.isfinite(report.wait_p95_s) else None
    document["timeline"] = [list(point) for point in report.timeline]
    return document
