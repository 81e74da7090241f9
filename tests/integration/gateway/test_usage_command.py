"""`octavo usage` and the settings of a whole server: what an administrator sees of the ledger."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import aiohttp

from fakes.gateway_door import HELLO, entry
from fakes.openai_replica import OpenAIReplica
from octavo_gateway.registry import Registry
from octavo_gateway.server import GatewayServer
from octavo_gateway.settings import GatewaySettings
from octavo_gateway.tenancy import hash_key, new_key
from octavo_gateway.tenancy.keys import format_hash

COMMAND = [sys.executable, "-c", "from octavo_cli.main import main; main()", "usage"]
TENANT = """
apiVersion: serving.octavo.dev/v1alpha1
kind: InferenceTenant
metadata: {name: team-a}
spec: {keySecretRefs: [{name: keys}]}
---
apiVersion: v1
kind: Secret
metadata: {name: keys}
stringData: {laptop: "HASH"}
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False)


async def test_a_server_brings_its_tenants_and_ledger_and_the_command_reads_them(tmp_path: Path) -> None:
    key = new_key()
    (tmp_path / "tenants.yaml").write_text(TENANT.replace("HASH", format_hash(hash_key(key))))
    settings = GatewaySettings(port=0, tenants=str(tmp_path / "tenants.yaml"), ledger=str(tmp_path / "usage"))
    registry = Registry()
    async with OpenAIReplica("r", tokens=5, cached_tokens=4).serve() as replica, aiohttp.ClientSession() as http:
        registry.publish([entry(replica)])
        server = GatewayServer.from_settings(settings, registry)
        await server.start()
        for headers in ({"authorization": f"Bearer {key}"}, {}):
            async with http.post(f"{server.address}/v1/chat/completions", json=HELLO, headers=headers) as response:
                await response.read()
        await server.stop()
    table = run(str(tmp_path / "usage"), "--by", "tenant,model")
    document = run(str(tmp_path / "usage" / "usage.sqlite"), "--by", "key,outcome", "--json")

    assert "team-a" in table.stdout
    (row,) = json.loads(document.stdout)
    assert row == {
        "key": "team-a/laptop",
        "outcome": "ok",
        "requests": 1,
        "prompt_tokens": 7,
        "cached_tokens": 4,
        "output_tokens": 5,
        "estimated_requests": 0,
        "cost": 0.0,
    }


def test_a_wrong_group_or_place_is_told(tmp_path: Path) -> None:
    wrong_group = run(str(tmp_path), "--by", "tenant,colour")
    wrong_place = run(str(tmp_path / "nowhere"))

    assert wrong_group.returncode == 2
    assert "colour" in wrong_group.stderr
    assert wrong_place.returncode == 2
    assert "nowhere" in wrong_place.stderr
    assert "Traceback" not in wrong_place.stderr
