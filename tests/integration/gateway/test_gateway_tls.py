"""TLS at the door and mutual TLS towards replicas, with certificates made for the test."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from fakes.gateway_door import HELLO, entry, open_door, until
from fakes.openai_replica import OpenAIReplica
from octavo_gateway.discovery import StaticDiscovery
from octavo_gateway.errors import ConfigError
from octavo_gateway.registry import Registry
from octavo_gateway.upstream import UpstreamPool, replica_context


@dataclass
class Authority:
    """A certificate authority whose files lie in `folder`."""

    folder: Path
    authority: trustme.CA

    @property
    def ca(self) -> str:
        path = self.folder / "ca.pem"
        self.authority.cert_pem.write_to_path(str(path))
        return str(path)

    def pair(self, *names: str) -> tuple[str, str]:
        """Certificate and key for these names."""
        made = self.authority.issue_cert(*names)
        certificate, key = self.folder / f"{names[0]}.pem", self.folder / f"{names[0]}.key"
        for number, blob in enumerate(made.cert_chain_pems):
            blob.write_to_path(str(certificate), append=number > 0)
        made.private_key_pem.write_to_path(str(key))
        return str(certificate), str(key)

    def served_to_known_clients(self, *names: str) -> dict[str, Any]:
        """uvicorn's settings of a server that asks for a certificate of this authority."""
        certificate, key = self.pair(*names)
        return {
            "ssl_certfile": certificate,
            "ssl_keyfile": key,
            "ssl_ca_certs": self.ca,
            "ssl_cert_reqs": ssl.CERT_REQUIRED,
        }


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    folder = tmp_path / "ours"
    folder.mkdir()
    return Authority(folder, trustme.CA())


@pytest.fixture
def theirs(tmp_path: Path) -> Authority:
    folder = tmp_path / "theirs"
    folder.mkdir()
    return Authority(folder, trustme.CA())


async def test_clients_that_trust_the_certificate_stream_over_tls_and_others_are_turned_away(ours: Authority) -> None:
    certificate, key = ours.pair("127.0.0.1")
    trusting = ssl.create_default_context(cafile=ours.ca)
    async with (
        OpenAIReplica("r", tokens=50).serve() as replica,
        open_door(entry(replica), tls_certificate=certificate, tls_key=key) as door,
    ):
        assert door.url.startswith("https://")
        text = await door.events(HELLO, ssl=trusting)
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await door.events(HELLO, ssl=ssl.create_default_context())
        async with aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.ClientError):
                await http.get(door.url.replace("https", "http") + "/health")

    assert "r-49" in text
    assert text.endswith("data: [DONE]\n\n")


async def test_replicas_and_the_gateway_know_each_other_by_certificate(ours: Authority) -> None:
    certificate, key = ours.pair("gateway.octavo")
    settings = {"upstream_ca": ours.ca, "upstream_certificate": certificate, "upstream_key": key}
    async with (
        OpenAIReplica("r", tokens=50).serve(**ours.served_to_known_clients("127.0.0.1")) as replica,
        open_door(entry(replica), **settings) as door,
    ):
        text = await door.events(HELLO)
        status, _, _ = await door.read(HELLO)

    assert text.endswith("data: [DONE]\n\n")
    assert status == 200


async def test_a_replicas_certificate_may_carry_a_name_instead_of_its_address(ours: Authority) -> None:
    certificate, key = ours.pair("gateway.octavo")
    settings = {"upstream_ca": ours.ca, "upstream_certificate": certificate, "upstream_key": key}
    async with OpenAIReplica("r").serve(**ours.served_to_known_clients("engine.octavo")) as replica:
        async with open_door(entry(replica), **settings) as door:
            by_address, text, _ = await door.read(HELLO)
        async with open_door(entry(replica), **settings, upstream_server_name="engine.octavo") as door:
            by_name, _, _ = await door.read(HELLO)

    assert (by_address, by_name) == (502, 200)
    assert "certificate" not in text.lower()


@pytest.mark.parametrize("case", ["no certificate of ours", "another authority's certificate", "an untrusted replica"])
async def test_strangers_get_and_give_nothing(ours: Authority, theirs: Authority, case: str) -> None:
    certificate, key = (theirs if case.startswith("another") else ours).pair("gateway.octavo")
    settings: dict[str, Any] = {"upstream_ca": (theirs if case.startswith("an untrusted") else ours).ca}
    if not case.startswith("no"):
        settings |= {"upstream_certificate": certificate, "upstream_key": key}
    async with (
        OpenAIReplica("r").serve(**ours.served_to_known_clients("127.0.0.1")) as replica,
        open_door(entry(replica), **settings) as door,
    ):
        status, text, _ = await door.read(HELLO)

    assert status == 502
    assert "127.0.0.1" not in text
    assert replica.received == []


async def test_readiness_is_asked_over_the_same_mutual_tls(ours: Authority, tmp_path: Path) -> None:
    pool = UpstreamPool(tls=replica_context(ours.ca, *ours.pair("gateway.octavo")))
    registry = Registry()
    async with OpenAIReplica("r").serve(**ours.served_to_known_clients("127.0.0.1")) as replica:
        path = tmp_path / "gateway.yaml"
        path.write_text(f'models: [{{name: m, endpoints: [{{url: "{replica.url}"}}]}}]')
        discovery = StaticDiscovery(path, registry, pool)
        await discovery.probe()
        assert registry.snapshot.models["m"].ready
        await StaticDiscovery(path, registry, UpstreamPool()).probe()
        assert not registry.snapshot.models["m"].ready
    pool.close()


def test_files_that_are_no_certificates_are_named(ours: Authority, tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("hello")
    certificate, _ = ours.pair("gateway.octavo")
    with pytest.raises(ConfigError, match=r"upstream_ca: .*nonsense\.pem"):
        replica_context(str(nonsense), None, None)
    with pytest.raises(ConfigError, match="upstream_certificate"):
        replica_context(ours.ca, certificate, str(nonsense))


async def test_idle_connections_over_tls_are_reused(ours: Authority) -> None:
    settings = {"upstream_ca": ours.ca, "report_interval": 60}
    certificate, key = ours.pair("127.0.0.1")
    tls = {"ssl_certfile": certificate, "ssl_keyfile": key}
    async with OpenAIReplica("r").serve(**tls) as replica, open_door(entry(replica), **settings) as door:
        for _ in range(5):
            await door.read(HELLO)
        await until(lambda: 1 <= door.server.app.pool.idle <= 2)
