"""A running operator listens at its health port alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from e2e import control_plane
from e2e.control_plane import ControlPlane
from fakes.listening import listening
from fakes.replica_process import free_port

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(control_plane.missing_reason()), reason=control_plane.missing_reason()),
]


def test_an_operator_listens_at_its_health_port_alone(plane: ControlPlane, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "octavo_cli.main", "operator", f"--health-port={port}"],
            stdout=sink,
            stderr=sink,
            env={**os.environ, "KUBECONFIG": str(plane.kubeconfig)},
        )
    try:
        deadline = time.monotonic() + 60
        while ("0.0.0.0", port) not in listening(process.pid):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        time.sleep(2)  # whatever starts after it
        assert listening(process.pid) == {("0.0.0.0", port)}
    finally:
        process.terminate()
        process.wait()
