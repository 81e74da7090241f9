"""Compare Octavo's scaling law with those of HPA, KEDA, Knative, KubeAI, AIBrix and WVA on simulated traces.

    python benchmarks/autoscaler.py [--seeds 11 12 13] [--cold-start 150] [--quick]
        [--out benchmarks/results/autoscaler.json] [--plot benchmarks/results/autoscaler.svg]

Seeds 11 to 13 were not used to choose any default. Every law is played with its usual target and, so that laws can be
compared at equal cost, with others (not with --quick). The table shows means over traces and seeds; lower is better but
for the share of requests with a first token within 2 s. octavo_operator/autoscale/simulate.py says what is left out.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.progress import track
from rich.table import Table

from octavo_operator.autoscale import laws, workload
from octavo_operator.autoscale.plane import plane
from octavo_operator.autoscale.policy import ScalingPolicy
from octavo_operator.autoscale.simulate import Hardware, Law, Report, simulate
from octavo_operator.autoscale.workload import Arrival

HOUR = 3_600.0
TRACES: dict[str, Callable[[int], list[Arrival]]] = {
    "steady": lambda seed: workload.steady(8.0, HOUR, seed),
    "step": lambda seed: workload.step(3.0, 18.0, HOUR, seed),
    "bursty": lambda seed: workload.bursty(4.0, 20.0, HOUR, seed),
    "diurnal": lambda seed: workload.diurnal(1.0, 20.0, HOUR, seed),
}


@dataclass(frozen=True)
class Family:
    """A law and its targets, the usual one first."""

    name: str
    targets: tuple[float, ...]
    make: Callable[[float, Hardware], Law]


def _octavo(target: float, hardware: Hardware) -> Law:
    bounds = ScalingPolicy(
        min_replicas=hardware.min_replicas,
        max_replicas=hardware.max_replicas,
        max_num_seqs=hardware.max_num_seqs,
        kv_target=target,
    )
    return laws.OctavoLaw(bounds)


FAMILIES = (
    Family("Octavo, KV", (0.65, 0.75, 0.50, 0.40, 0.30), _octavo),
    Family("AIBrix APA, KV", (0.5, 0.6, 0.35, 0.25), lambda t, _: laws.AIBrixLaw(t)),
    Family("WVA v1, spare KV", (0.1, 0.3, 0.4), lambda t, _: laws.VariantAutoscalerLaw(spare_kv=t)),
    Family("WVA v2, use", (0.85, 0.5), lambda t, _: laws.TokenCapacityLaw(up=t, down=t * 0.70 / 0.85)),
    Family("HPA, KV", (0.8, 0.5, 0.3), lambda t, _: laws.hpa_kv(t)),
    Family("Knative KPA, active", (32.0, 64.0, 16.0), lambda t, _: laws.KnativeLaw(t)),
    Family("KubeAI, active", (32.0, 64.0, 16.0), lambda t, _: laws.KubeAILaw(t)),
    Family("KEDA, waiting", (5.0, 2.0), lambda t, _: laws.keda_queue(t)),
    Family("KEDA, waiting 5 and KV", (0.8, 0.3), lambda t, _: laws.keda_both(5.0, t)),
)


@dataclass(frozen=True)
class Run:
    """One law with one target on one trace."""

    family: str
    target: float
    trace: str
    seed: int
    report: Report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--cold-start", type=float, default=150.0, help="seconds until a new replica is ready")
    parser.add_argument("--quick", action="store_true", help="only the usual target of each law")
    parser.add_argument("--out", type=Path, help="write every run as JSON")
    parser.add_argument("--plot", type=Path, help="draw cost against missed requests as SVG")
    options = parser.parse_args()
    hardware = Hardware(cold_start_s=options.cold_start)
    points = [(f, t) for f in FAMILIES for t in (f.targets[:1] if options.quick else f.targets)]
    plan = [(f, t, trace, seed) for f, t in points for trace in TRACES for seed in options.seeds]
    runs = [
        Run(family.name, target, trace, seed, simulate(family.make(target, hardware), TRACES[trace](seed), hardware))
        for family, target, trace, seed in track(plan, description="simulating")
    ]
    Console().print(_table(runs, hardware))
    if options.out:
        options.out.write_text(json.dumps(_document(runs, hardware, options.seeds), indent=1) + "\n")
    if options.plot:
        title = f"Scaling laws, cold start {hardware.cold_start_s:g} s, seeds {', '.join(map(str, options.seeds))}"
        options.plot.write_text(plane(_curves(runs), title))


def _grouped(runs: list[Run]) -> dict[tuple[str, float], list[Report]]:
    groups: dict[tuple[str, float], list[Report]] = {}
    for run in runs:
        groups.setdefault((run.family, run.target), []).append(run.report)
    return groups


def _curves(runs: list[Run]) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for (family, _), reports in _grouped(runs).items():
        point = fmean(r.replica_hours for r in reports), fmean(1 - r.slo_met for r in reports)
        curves.setdefault(family, []).append(point)
    return curves


def _table(runs: list[Run], hardware: Hardware) -> Table:
    table = Table(title=f"Scaling laws, cold start {hardware.cold_start_s:g} s")
    table.add_column("law and target")
    for column in ("replica-hours", "first token in 2 s", "p95 wait s", "reversals", "peak"):
        table.add_column(column, justify="right")
    for (family, target), reports in _grouped(runs).items():
        waits = [r.wait_p95_s for r in reports if math.isfinite(r.wait_p95_s)]
        table.add_row(
            f"{family} {target:g}",
            f"{fmean(r.replica_hours for r in reports):.2f}",
            f"{fmean(r.slo_met for r in reports):.3f}",
            f"{fmean(waits):.0f}" if len(waits) == len(reports) else "unserved",
            f"{fmean(r.reversals for r in reports):.1f}",
            str(max(r.peak_replicas for r in reports)),
        )
    return table


def _document(runs: list[Run], hardware: Hardware, seeds: list[int]) -> dict[str, object]:
    return {
        "date": dt.date.today().isoformat(),
        "python": platform.python_version(),
        "what": "simulation; no hardware was measured",
        "coldStartSeconds": hardware.cold_start_s,
        "seeds": seeds,
        "runs": [
            {
                "law": run.family,
                "target": run.target,
                "trace": run.trace,
                "seed": run.seed,
                "replicaHours": round(run.report.replica_hours, 3),
                "sloMet": round(run.report.slo_met, 4),
                "waitP95Seconds": run.report.wait_p95_s if math.isfinite(run.report.wait_p95_s) else None,
                "reversals": run.report.reversals,
                "peakReplicas": run.report.peak_replicas,
            }
            for run in runs
        ],
    }


if __name__ == "__main__":
    main()
