"""What a gateway adds: time to first byte and CPU per request, at 1 to 500 concurrent streams, beside its peers.

A mock replica streams 20 events, 50 ms apart, so that every difference is the gateway's. Each round measures the
replica directly and through each gateway in turn; the table shows medians over rounds of (through gateway - direct).
One client process, one replica process and one gateway process share the machine's cores. The client checks every
answer.

    python benchmarks/gateway.py [--streams 1 50 100 500] [--rounds 3] [--json FILE]
        [--vllm-router /path/to/bin/vllm-router] [--litellm /path/to/bin/litellm]

Peers are installed in environments of their own: `pip install vllm-router` (the vLLM project's, written in Rust),
`pip install 'litellm[proxy]'`.
"""

from __future__ import annotations

import argparse
import asyncio
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
from dataclasses import dataclass
from pathlib import Path

import httptools
import uvloop

EVENTS, PACE_S = 20, 0.05
EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":"hello "},"finish_reason":null}]}\n\n'
)
LAST = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
)
DONE = b"data: [DONE]\n\n"
MODELS = b'{"object":"list","data":[{"id":"m","object":"model","created":1,"owned_by":"x"}]}'
REPLICA_PORT = 19_101
KEY = "sk-benchmark-4f1c2b7a9d3e4c5f8a6b7c8d9e0f1a2b"  # LiteLLM refuses to start without one


# ---- the mock replica (`gateway.py replica`)


class Replica(asyncio.Protocol):
    """Speaks just enough HTTP/1.1, as cheaply as Python can."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)
        self.url = b""
        self.left = 0

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_message_complete(self) -> None:
        if self.url.startswith((b"/health", b"/v1/models")):
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(MODELS)
            self.transport.write(head + MODELS)
        elif self.url.startswith(b"/metrics"):
            self.transport.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
        else:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            self.transport.write(head)
            self.left = EVENTS
            self.tick()

    def tick(self) -> None:
        if self.transport.is_closing():
            return
        if self.left:
            self.left -= 1
            self.transport.write(b"%x\r\n%s\r\n" % (len(EVENT), EVENT))
            asyncio.get_running_loop().call_later(PACE_S, self.tick)
        else:
            end = LAST + DONE
            self.transport.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(end), end))


async def replica() -> None:
    server = await asyncio.get_running_loop().create_server(Replica, "127.0.0.1", REPLICA_PORT, backlog=4096)
    await server.serve_forever()


# ---- the client (`gateway.py client PORT STREAMS REQUESTS`)

BODY = json.dumps(
    {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hello there " * 20}]}
).encode()
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    b"authorization: Bearer %s\r\ncontent-length: %d\r\n\r\n%s" % (KEY.encode(), len(BODY), BODY)
)


class Client(asyncio.Protocol):
    """One connection, one stream at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.answer: asyncio.Future[tuple[float, float]] | None = None

    def ask(self) -> asyncio.Future[tuple[float, float]]:
        self.answer = asyncio.get_running_loop().create_future()
        self.parser = httptools.HttpResponseParser(self)
        self.body = bytearray()
        self.first = 0.0
        self.began = time.perf_counter()
        self.transport.write(REQUEST)
        return self.answer

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        if not self.first:
            self.first = time.perf_counter() - self.began
        self.body += body

    def on_message_complete(self) -> None:
        assert self.answer is not None
        texts = self.body.count(b'"content":"hello "')
        if self.parser.get_status_code() != 200 or texts != EVENTS or b"[DONE]" not in self.body:
            self.answer.set_exception(RuntimeError(f"wrong answer: {bytes(self.body[:300])!r}"))
        else:
            self.answer.set_result((self.first, time.perf_counter() - self.began))

    def connection_lost(self, error: Exception | None) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(RuntimeError("connection lost"))


async def client(port: int, streams: int, requests: int) -> None:
    firsts: list[float] = []
    totals: list[float] = []
    errors = 0

    async def one(number: int) -> None:
        nonlocal errors
        await asyncio.sleep(number / streams * (EVENTS * PACE_S))  # arrivals spread over one answer's time
        _, connection = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port)
        for turn in range(requests + 1):
            try:
                first, total = await connection.ask()
            except RuntimeError:
                errors += 1
                return
            if turn:  # the first one warms connections up
                firsts.append(first)
                totals.append(total)
        connection.transport.close()

    await asyncio.gather(*(one(number) for number in range(streams)))
    firsts.sort()
    totals.sort()
    print(
        json.dumps(
            {
                "requests": len(firsts),
                "errors": errors,
                "ttfb_p50": firsts[len(firsts) // 2] if firsts else None,
                "ttfb_p99": firsts[int(len(firsts) * 0.99)] if firsts else None,
                "total_p50": totals[len(totals) // 2] if totals else None,
            }
        )
    )


# ---- the rounds


@dataclass
class Gateway:
    """A running gateway; `process` is None for the replica itself."""

    name: str
    port: int
    process: subprocess.Popen[bytes] | None


def start_octavo(folder: Path) -> Gateway:
    config = folder / "octavo.yaml"
    config.write_text(f'models: [{{name: m, endpoints: [{{url: "http://127.0.0.1:{REPLICA_PORT}"}}]}}]')
    command = [sys.executable, "-c", "from octavo_cli.main import main; main()", "gateway", "--config", str(config)]
    return _start("octavo", [*command, "--port", "19102", "--log-level", "warning", "--no-access-log"], 19_102)


def start_vllm_router(binary: str) -> Gateway:
    command = [binary, "--host", "127.0.0.1", "--port", "19103", "--policy", "round_robin", "--log-level", "warning"]
    command += ["--prometheus-port", "19105", "--worker-urls", f"http://127.0.0.1:{REPLICA_PORT}"]
    return _start("vllm-router", command, 19_103)


def start_litellm(binary: str, folder: Path) -> Gateway:
    config = folder / "litellm.yaml"
    params = f'{{model: openai/m, api_base: "http://127.0.0.1:{REPLICA_PORT}/v1", api_key: x}}'
    general = f"general_settings: {{master_key: {KEY}}}\n"
    config.write_text(f"model_list:\n  - model_name: m\n    litellm_params: {params}\n{general}")
    command = [binary, "--config", str(config), "--host", "127.0.0.1", "--port", "19104", "--num_workers", "1"]
    return _start("litellm", command, 19_104)


def _start(name: str, command: list[str], port: int) -> Gateway:
    log = Path(tempfile.gettempdir()) / f"benchmark-gateway-{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    for _ in range(240):
        try:
            question = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/models", headers={"authorization": f"Bearer {KEY}"}
            )
            with urllib.request.urlopen(question, timeout=2) as answer:
                if b'"m"' in answer.read():
                    return Gateway(name, port, process)
        except (urllib.error.URLError, OSError):
            pass
        if process.poll() is not None:
            break
        time.sleep(0.5)
    process.kill()
    raise SystemExit(f"{name} does not start; its log is {log}")


def measure(port: int, streams: int, requests: int) -> dict[str, float]:
    output = subprocess.run(
        [sys.executable, __file__, "client", str(port), str(streams), str(requests)], check=True, capture_output=True
    ).stdout
    result: dict[str, float] = json.loads(output)
    return result


def cpu_seconds(gateway: Gateway) -> float:
    """CPU time of a gateway's process and its children."""
    if gateway.process is None:
        return 0.0
    group = os.getpgid(gateway.process.pid)
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_mib(gateway: Gateway) -> float:
    assert gateway.process is not None
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


def run(options: argparse.Namespace, gateways: list[Gateway]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    print(
        f"{'streams':>7} {'gateway':18} {'added p50':>10} {'added p99':>10} "
        f"{'CPU/request':>12} {'errors':>7} {'RSS':>8}"
    )
    for streams in options.streams:
        requests = max(2, min(20, 200 // streams))
        rounds: dict[str, list[dict[str, float]]] = {g.name: [] for g in gateways}
        direct = []
        for _ in range(options.rounds):
            direct.append(measure(REPLICA_PORT, streams, requests))
            for gateway in gateways:
                before = cpu_seconds(gateway)
                result = measure(gateway.port, streams, requests)
                result["cpu"] = (cpu_seconds(gateway) - before) / max(1, result["requests"] + streams)
                rounds[gateway.name].append(result)
        for gateway in gateways:
            found = [r for r in rounds[gateway.name] if r["requests"]]
            row: dict[str, object] = {"streams": streams, "gateway": gateway.name}
            for key in ("ttfb_p50", "ttfb_p99"):
                base = statistics.median(r[key] for r in direct)
                row[f"direct_{key}_ms"] = base * 1e3
                row[f"added_{key}_ms"] = statistics.median(r[key] - base for r in found) * 1e3 if found else None
            row["cpu_ms"] = statistics.median(r["cpu"] for r in found) * 1e3 if found else None
            row["errors"] = sum(r["errors"] for r in rounds[gateway.name])
            row["rss_mib"] = memory_mib(gateway)
            rows.append(row)
            print(
                f"{streams:7d} {gateway.name:18} {_ms(row['added_ttfb_p50_ms'])} {_ms(row['added_ttfb_p99_ms'])} "
                f"{_ms(row['cpu_ms']):>12} {row['errors']:7.0f} {row['rss_mib']:5.0f}MiB",
                flush=True,
            )
    return rows


def _ms(value: object) -> str:
    return f"{value:8.2f}ms" if isinstance(value, float) else f"{'-':>10}"


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "replica":
        uvloop.run(replica())
        return
    if len(sys.argv) > 1 and sys.argv[1] == "client":
        uvloop.run(client(*(int(word) for word in sys.argv[2:5])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 50, 100, 500])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm-router", metavar="BINARY")
    parser.add_argument("--litellm", metavar="BINARY")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    mock = subprocess.Popen([sys.executable, __file__, "replica"])
    gateways: list[Gateway] = []
    try:
        time.sleep(1)
        with tempfile.TemporaryDirectory() as folder:
            gateways.append(start_octavo(Path(folder)))
            if options.vllm_router:
                gateways.append(start_vllm_router(options.vllm_router))
            if options.litellm:
                gateways.append(start_litellm(options.litellm, Path(folder)))
            print(
                f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
                f"Python {platform.python_version()}"
            )
            rows = run(options, gateways)
    finally:
        for gateway in gateways:
            if gateway.process is not None:
                gateway.process.terminate()
        mock.kill()
    if options.json:
        document = {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
