"""What a gateway adds: time to first byte, time of every streamed event, and CPU per request, beside its peers.

A mock replica streams 20 events, 50 ms apart; the client and the replica read the same clock, so the time that each
event was under way is known (`gateway_load.py`). Each round measures the replica directly and through each gateway in
turn, and takes the differences of that round; the table shows their median and quartiles over rounds. One client
process, one replica process and one gateway process share the machine's cores. Every answer is checked.

    python benchmarks/gateway.py [--streams 1 50 500] [--rounds 5] [--json FILE]
        [--vllm-router BINARY] [--production-stack BINARY] [--litellm BINARY]

Peers are installed in environments of their own: `pip install vllm-router` (the vLLM project's, written in Rust);
`vllm-router` of a checkout of vllm-project/production-stack (in Python; it is not on PyPI); `pip install
'litellm[proxy]'`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from gateway_load import KEY, Load

LOAD = Path(__file__).with_name("gateway_load.py")
REPLICA_PORT = 19_101
REPLICA_URL = f"http://127.0.0.1:{REPLICA_PORT}"
BIG_BODY_BYTES = 220_000


@dataclass
class Gateway:
    """A running gateway."""

    name: str
    port: int
    process: subprocess.Popen[bytes]

    @property
    def stats(self) -> list[list[str]]:
        """The fields of /proc/PID/stat behind the name, of the gateway's process and its children."""
        group = os.getpgid(self.process.pid)
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group:
                found.append(fields)
        return found

    @property
    def cpu_seconds(self) -> float:
        ticks = sum(int(fields[11]) + int(fields[12]) for fields in self.stats)
        return ticks / os.sysconf("SC_CLK_TCK")

    @property
    def memory_mib(self) -> float:
        return sum(int(fields[21]) for fields in self.stats) * os.sysconf("SC_PAGE_SIZE") / 2**20


def start_octavo(folder: Path, *flags: str) -> Gateway:
    """This repository's gateway over the mock replica."""
    config = folder / "octavo.yaml"
    config.write_text(f'models: [{{name: m, endpoints: [{{url: "{REPLICA_URL}"}}]}}]')
    command = [sys.executable, "-c", "from octavo_cli.main import main; main()", "gateway", "--config", str(config)]
    return _start("octavo", [*command, "--port", "19102", "--log-level", "warning", "--no-access-log", *flags], 19_102)


def start_vllm_router(binary: str, folder: Path) -> Gateway:
    command = [binary, "--host", "127.0.0.1", "--port", "19103", "--policy", "round_robin", "--log-level", "warning"]
    return _start("vllm-router", [*command, "--prometheus-port", "19105", "--worker-urls", REPLICA_URL], 19_103)


def start_production_stack(binary: str, folder: Path) -> Gateway:
    command = [binary, "--host", "127.0.0.1", "--port", "19106", "--service-discovery", "static"]
    command += ["--static-backends", REPLICA_URL, "--static-models", "m", "--routing-logic", "roundrobin"]
    return _start("production-stack", [*command, "--log-level", "warning"], 19_106)


def start_litellm(binary: str, folder: Path) -> Gateway:
    config = folder / "litellm.yaml"
    params = f'{{model: openai/m, api_base: "{REPLICA_URL}/v1", api_key: x}}'
    general = f"general_settings: {{master_key: {KEY}}}\n"
    config.write_text(f"model_list:\n  - model_name: m\n    litellm_params: {params}\n{general}")
    command = [binary, "--config", str(config), "--host", "127.0.0.1", "--port", "19104", "--num_workers", "1"]
    return _start("litellm", command, 19_104)


PEERS: dict[str, Callable[[str, Path], Gateway]] = {
    "vllm_router": start_vllm_router,
    "production_stack": start_production_stack,
    "litellm": start_litellm,
}


def _start(name: str, command: list[str], port: int) -> Gateway:
    log = Path(tempfile.gettempdir()) / f"benchmark-gateway-{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    for _ in range(240):
        if process.poll() is not None:  # whoever answers at that port, it is not this one
            break
        try:
            question = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/models", headers={"authorization": f"Bearer {KEY}"}
            )
            with urllib.request.urlopen(question, timeout=2) as answer:
                if b'"m"' in answer.read():
                    return Gateway(name, port, process)
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.5)
    process.kill()
    raise SystemExit(f"{name} does not start; its log is {log}")


def start_replica() -> subprocess.Popen[bytes]:
    """The mock replica, once it answers."""
    process = subprocess.Popen([sys.executable, str(LOAD), "replica", str(REPLICA_PORT)])
    for _ in range(100):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{REPLICA_URL}/health", timeout=2).close()
        except OSError:
            time.sleep(0.1)
        else:
            return process
    process.kill()
    raise SystemExit("the mock replica does not start")


def measure(load: Load) -> dict[str, float]:
    """One client's summary."""
    command = [sys.executable, str(LOAD), "client", json.dumps(asdict(load))]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return result


def compare(title: str, load: Callable[[int], Load], gateways: list[Gateway], rounds: int) -> list[dict[str, object]]:
    """Interleaved rounds of one load; prints and returns one row per gateway."""
    found: dict[str, list[dict[str, float]]] = {g.name: [] for g in gateways}
    direct: list[dict[str, float]] = []
    for _ in range(rounds):
        base = measure(load(REPLICA_PORT))
        direct.append(base)
        for gateway in gateways:
            before, asked = gateway.cpu_seconds, load(gateway.port)
            result = measure(asked)
            result["cpu"] = (gateway.cpu_seconds - before) / max(1, result["requests"] + asked.streams)
            for key in MEASURES:
                if result[key] is not None:
                    result[f"added_{key}"] = result[key] - base[key]
            found[gateway.name].append(result)
    rows = [_row(title, gateway, found[gateway.name], direct) for gateway in gateways]
    for row in rows:
        shown = "  ".join(f"{_ms(row[f'added_{key}_ms']):>22}" for key in MEASURES)
        print(f"{title:16} {row['gateway']:17} {shown}  {row['cpu_ms']:8.2f}ms {row['errors']:6} "
              f"{row['memory_mib']:5.0f}MiB", flush=True)  # fmt: skip
    return rows


MEASURES = ("first_p50", "first_p99", "transit_p50", "transit_p99")
HEADINGS = ("first byte p50", "first byte p99", "event p50", "event p99")


def _row(
    title: str, gateway: Gateway, results: list[dict[str, float]], direct: list[dict[str, float]]
) -> dict[str, object]:
    row: dict[str, object] = {"load": title, "gateway": gateway.name, "memory_mib": gateway.memory_mib}
    for key in MEASURES:
        row[f"direct_{key}_ms"] = statistics.median(r[key] for r in direct) * 1e3
        row[f"added_{key}_ms"] = _quartiles([r[f"added_{key}"] * 1e3 for r in results if f"added_{key}" in r])
    row["cpu_ms"] = statistics.median(r["cpu"] for r in results) * 1e3
    row["errors"] = sum(int(r["errors"]) for r in results)
    row["error"] = next((r["error"] for r in results if r["error"]), None)
    return row


def _quartiles(values: list[float]) -> list[float] | None:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values * 3 or None
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, middle, high]


def _ms(quartiles: object) -> str:
    if not isinstance(quartiles, list):
        return "-"
    low, middle, high = quartiles
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 50, 500])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-big-body", action="store_true", help="leave out the 220 KB requests")
    for name in PEERS:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="BINARY")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    replica = start_replica()
    gateways: list[Gateway] = []
    rows: list[dict[str, object]] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            gateways.append(start_octavo(Path(folder)))
            for name, start in PEERS.items():
                if binary := getattr(options, name):
                    gateways.append(start(binary, Path(folder)))
            print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
                  f"Python {platform.python_version()}; added milliseconds, median [quartiles]")  # fmt: skip
            headings = "  ".join(f"{word:>22}" for word in HEADINGS)
            print(f"{'load':16} {'gateway':17} {headings}  CPU/request errors      RSS", flush=True)
            for streams in options.streams:
                requests = max(3, min(5, 200 // streams))
                title = f"{streams} stream{'s' if streams > 1 else ''}"
                rows += compare(title, lambda port: Load(port, streams, requests), gateways, options.rounds)  # noqa: B023
            if not options.no_big_body:  # 20 requests a second, whatever the answers' pace
                big = {"streams": 30, "requests": 2, "interval_s": 1.5, "body_bytes": BIG_BODY_BYTES, "unique": True}
                rows += compare("220 KB, 20/s", lambda port: Load(port, **big), gateways, options.rounds)  # type: ignore[arg-type]
    finally:
        for gateway in gateways:
            gateway.process.terminate()
        replica.kill()
    if options.json:
        document = {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
