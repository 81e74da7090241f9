"""Running programs listen exactly where chart and pod template declare it, and nowhere else."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from fakes.listening import Address, listening
from fakes.replica_process import free_port
from models.tiny_checkpoints import SIZES, write_checkpoint, write_tokenizer
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.validation import parse
from octavo_operator.plan import plan
from octavo_operator.render import render_plan

CHART = Path(__file__).parents[3] / "charts" / "octavo" / "templates"
COMMAND = [sys.executable, "-m", "octavo_cli.main"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OCTAVO_GATEWAY_ADMIN_TOKEN": "a-long-admin-token"}


@contextlib.contextmanager
def running(arguments: Sequence[str], ready: str, log: Path) -> Iterator[int]:
    """The process id of `octavo ARGUMENTS` once `ready` answers."""
    with log.open("wb") as sink:
        process = subprocess.Popen([*COMMAND, *arguments], stdout=sink, stderr=sink, env=ENVIRONMENT)
    try:
        while not _answers(ready):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def declared(component: str) -> dict[str, int]:
    """The ports of a component's container in the chart, by name."""
    found = re.findall(r"\{name: (\w+), containerPort: (\d+)\}", (CHART / component).read_text())
    return {name: int(port) for name, port in found}


def test_the_gateway_listens_where_the_chart_says(tmp_path: Path) -> None:
    ports = declared("gateway.yaml")
    flags = re.findall(r"- (--(?:host|port|metrics-port)=\S+)", (CHART / "gateway.yaml").read_text())
    assert sorted(flags) == sorted(["--host=0.0.0.0", f"--port={ports['http']}", f"--metrics-port={ports['metrics']}"])
    own = {port: free_port() for port in ports.values()}
    admin = free_port()
    given = [flag.replace(str(p), str(own[p])) for flag in flags for p in own if flag.endswith(f"={p}")]
    (tmp_path / "g.yaml").write_text(json.dumps({"models": []}))
    flags = ["--config", str(tmp_path / "g.yaml"), "--host=0.0.0.0", *given, f"--admin-port={admin}", "--workers=2"]
    ready = f"http://127.0.0.1:{own[ports['metrics']]}/health"
    with running(["gateway", *flags, "--batch-folder", str(tmp_path / "b")], ready, tmp_path / "log") as pid:
        assert listening(pid) == {*(("0.0.0.0", port) for port in own.values()), ("127.0.0.1", admin)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_checkpoint(folder, hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES))
    write_tokenizer(folder)
    return folder


def test_an_engine_listens_at_the_ports_of_its_pod(checkpoint: Path, tmp_path: Path) -> None:
    container = _container(routing={"kvEvents": True})
    ports = {port["containerPort"]: free_port() for port in container["ports"]}
    assert len(ports) == 3
    words = [_with_ports(word, ports).replace("hf://org/model", str(checkpoint)) for word in container["command"][1:]]
    ready = f"http://127.0.0.1:{ports[8000]}/health/ready"
    with running([*words, "--device", "cpu"], ready, tmp_path / "log") as pid:
        assert listening(pid) == {("0.0.0.0", port) for port in ports.values()}


def test_a_killed_engine_gives_its_ports_back_at_once(checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    arguments = ["serve", "--model", str(checkpoint), "--port", str(port), "--grpc-port", str(free_port())]
    for start in ("first", "second"):
        with running([*arguments, "--device", "cpu"], f"http://127.0.0.1:{port}/health/ready", tmp_path / start):
            pass  # ended by SIGKILL


def _container(**spec: Any) -> dict[str, Any]:
    service = parse(
        InferenceService,
        {
            "apiVersion": "serving.octavo.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": "chat", "namespace": "team"},
            "spec": {"model": {"storageUri": "hf://org/model"}, **spec},
        },
    )
    deployment = next(o for o in render_plan(plan(service)) if o["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(container)


def _with_ports(word: str, ports: dict[int, int]) -> str:
    for port, number in ports.items():
        word = re.sub(rf"(^|:){port}$", rf"\g<1>{number}", word)
    return word


def test_ranks_on_one_machine_meet_where_no_other_machine_reaches(checkpoint: Path, tmp_path: Path) -> None:
    """Their store is a file, and gloo's connections are made on the loopback interface."""
    port = free_port()
    arguments = ["serve", "--model", str(checkpoint), "--port", str(port), "--device", "cpu"]
    ready = f"http://127.0.0.1:{port}/health/ready"
    with running([*arguments, "--tensor-parallel-size", "2"], ready, tmp_path / "log") as pid:
        found: set[Address] = listening(pid)
    assert ("127.0.0.1", port) in found
    assert {address for address, _ in found} == {"127.0.0.1"}


def test_every_port_of_the_operator_is_one_that_its_flags_name() -> None:
    text = (CHART / "operator-deployment.yaml").read_text()
    flags = {int(port) for port in re.findall(r"--(?:health|webhook)-port=(\d+)", text)}
    assert set(declared("operator-deployment.yaml").values()) == flags
