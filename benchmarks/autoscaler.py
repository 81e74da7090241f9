"""Compare Octavo's scaling law with those of HPA, KEDA, Knative, KubeAI, AIBrix and WVA on simulated traces.

    python benchmarks/autoscaler.py [--seeds 11 12 13] [--cold-start 150] [--out benchmarks/results/autoscaler.json]

Seeds 11 to 13 were not used to choose any default. The table shows means over traces and seeds; lower is better but for
the share of requests with a first token within 2 s. What the model leaves out: octavo_operator/autoscale/simulate.py.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.progress import track
from rich.table import Table

from octavo_operator.autoscale import workload
from octavo_operator.autoscale.laws import all_laws
from octavo_operator.autoscale.simulate import Hardware, Report, simulate
from octavo_operator.autoscale.workload import Arrival

HOUR = 3_600.0
TRACES: dict[str, Callable[[int], list[Arrival]]] = {
    "steady": lambda seed: workload.steady(8.0, HOUR, seed),
    "step": lambda seed: workload.step(3.0, 18.0, HOUR, seed),
    "bursty": lambda seed: workload.bursty(4.0, 20.0, HOUR, seed),
    "diurnal": lambda seed: workload.diurnal(1.0, 20.0, HOUR, seed),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--cold-start", type=float, default=150.0, help="seconds until a new replica is ready")
    parser.add_argument("--out", type=Path, help="write every run as JSON")
    options = parser.parse_args()
    hardware = Hardware(cold_start_s=options.cold_start)
    names = [law.name for law in all_laws(hardware)]
    runs = [(trace, seed, index) for trace in TRACES for seed in options.seeds for index in range(len(names))]
    reports: dict[str, list[tuple[str, int, Report]]] = {name: [] for name in names}
    for trace, seed, index in track(runs, description="simulating"):
        law = all_laws(hardware)[index]
        reports[law.name].append((trace, seed, simulate(law, TRACES[trace](seed), hardware)))
    Console().print(_table(reports, hardware))
    if options.out:
        options.out.write_text(json.dumps(_document(reports, hardware, options.seeds), indent=1) + "\n")


def _table(reports: dict[str, list[tuple[str, int, Report]]], hardware: Hardware) -> Table:
    table = Table(title=f"Scaling laws, cold start {hardware.cold_start_s:g} s")
    table.add_column("law")
    for column in ("replica-hours", "first token in 2 s", "p95 wait s", "reversals", "peak"):
        table.add_column(column, justify="right")
    for name, runs in reports.items():
        found = [report for _, _, report in runs]
        waits = [r.wait_p95_s for r in found if math.isfinite(r.wait_p95_s)]
        table.add_row(
            name,
            f"{fmean(r.replica_hours for r in found):.2f}",
            f"{fmean(r.slo_met for r in found):.3f}",
            f"{fmean(waits):.0f}" if len(waits) == len(found) else "unserved",
            f"{fmean(r.reversals for r in found):.1f}",
            str(max(r.peak_replicas for r in found)),
        )
    return table


def _document(
    reports: dict[str, list[tuple[str, int, Report]]], hardware: Hardware, seeds: list[int]
) -> dict[str, object]:
    return {
        "date": dt.date.today().isoformat(),
        "python": platform.python_version(),
        "what": "simulation; no hardware was measured",
        "coldStartSeconds": hardware.cold_start_s,
        "seeds": seeds,
        "runs": [
            {
                "law": name,
                "trace": trace,
                "seed": seed,
                "replicaHours": round(report.replica_hours, 3),
                "sloMet": round(report.slo_met, 4),
                "waitP95Seconds": report.wait_p95_s if math.isfinite(report.wait_p95_s) else None,
                "reversals": report.reversals,
                "peakReplicas": report.peak_replicas,
            }
            for name, runs in reports.items()
            for trace, seed, report in runs
        ],
    }


if __name__ == "__main__":
    main()
