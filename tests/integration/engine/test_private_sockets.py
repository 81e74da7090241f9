"""What arrives on the engine's sockets from somebody else: only its owner reaches them, and bytes are no code."""

from __future__ import annotations

import asyncio
import random
import socket
import stat
from pathlib import Path

import psutil
import pytest
import zmq

from fake_runner import greedy, load_fake
from fakes.eventually import eventually
from octavo_engine.config import EngineConfig
from octavo_engine.errors import EngineDeadError
from octavo_engine.process import EngineProcessClient
from octavo_engine.sampling_params import SamplingParams

PICKLE = b"cos\nsystem\n(S'touch %s'\ntR."  # what a server that unpickles would run


def hostile_bytes(rng: random.Random, canary: Path) -> bytes:
    """Other protocols, cut and oversized frames, pickles, noise: nothing that is a whole message of ZeroMQ's."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    return rng.choice([
        b"", b"GET / HTTP/1.1\r\n\r\n", greeting[: rng.randrange(len(greeting))], PICKLE % str(canary).encode(),
        greeting + b"\x04\xffREADY",
        greeting + b"\x02" + b"\xff" * 8 + rng.randbytes(50), b"\xff" + rng.randbytes(5_000),
    ])  # fmt: skip


async def tokens(client: EngineProcessClient, name: str) -> list[int]:
    sampling = SamplingParams(max_tokens=6, temperature=0.0)
    stream = client.generate(request_id=name, prompt_token_ids=[1, 2, 3], sampling=sampling)
    return [token async for output in stream for token in output.token_ids]


def socket_files(client: EngineProcessClient) -> list[Path]:
    """Of the engine's own process: where this one listens for it."""
    assert client.pid is not None
    listening = psutil.Process().net_connections(kind="unix")
    return sorted({Path(entry.laddr) for entry in listening if "octavo-engine-" in str(entry.laddr)})


async def test_noise_on_the_sockets_disturbs_nobody(tmp_path: Path) -> None:
    client = EngineProcessClient(
        EngineConfig(model="fake", block_size=4, num_kv_blocks=64, max_num_seqs=8, num_threads=1), load_fake
    )
    await client.start()
    try:
        files = socket_files(client)
        assert {file.name for file in files} == {"commands", "events"}
        for file in files:
            assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        rng, canary, pid = random.Random(0), tmp_path / "canary", client.pid
        for attempt in range(300):
            with socket.socket(socket.AF_UNIX) as door:
                door.connect(str(files[attempt % 2]))
                door.settimeout(0.2)
                try:
                    door.sendall(hostile_bytes(rng, canary))
                except (BrokenPipeError, ConnectionResetError, TimeoutError):
                    continue  # cut off already: as it should be
            if attempt % 25 == 0:
                assert await tokens(client, f"good{attempt}") == greedy([1, 2, 3], 6)
        client.check_health()
        assert client.pid == pid
        assert await tokens(client, "last") == greedy([1, 2, 3], 6)
        assert not canary.exists()
    finally:
        await client.shutdown(timeout_s=5.0)


async def test_who_stays_connected_gets_no_command() -> None:
    """What begins without a greeting is a peer of ZeroMQ's first protocol, and a peer could be sent something."""
    client = EngineProcessClient(
        EngineConfig(model="fake", block_size=4, num_kv_blocks=64, max_num_seqs=8, num_threads=1), load_fake
    )
    await client.start()
    try:
        commands = next(file for file in socket_files(client) if file.name == "commands")
        with socket.socket(socket.AF_UNIX) as door:
            door.connect(str(commands))
            door.sendall(b"GET / HTTP/1.1\r\n\r\n")
            await asyncio.sleep(0.2)
            for attempt in range(4):
                answer = await asyncio.wait_for(tokens(client, f"good{attempt}"), 20)
                assert answer == greedy([1, 2, 3], 6)
    finally:
        await client.shutdown(timeout_s=5.0)


@pytest.mark.parametrize("message", [b"", b"\xc1", PICKLE % b"/nowhere", b"\x81\xa4type\xa4step", b"\x93\x01\x02\x03"])
async def test_a_message_in_the_right_protocol_that_is_none_of_ours_ends_the_engine_with_the_reason(
    message: bytes,
) -> None:
    """Only a process of the same user can send one; whatever answers came from it, they cannot be trusted any more."""
    client = EngineProcessClient(
        EngineConfig(model="fake", block_size=4, num_kv_blocks=64, max_num_seqs=8, num_threads=1), load_fake
    )
    await client.start()
    pid = client.pid
    assert pid is not None
    intruder = zmq.Context()
    try:
        events = next(file for file in socket_files(client) if file.name == "events")
        push = intruder.socket(zmq.PUSH)
        push.connect(f"ipc://{events}")
        push.send(message)

        def is_dead() -> bool:
            try:
                client.check_health()
            except EngineDeadError as error:
                return "cannot read" in str(error)
            return False

        await eventually(is_dead, 20)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(tokens(client, "late"), 10)
        await eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", 20)
    finally:
        intruder.destroy(linger=0)
        await client.shutdown(timeout_s=5.0)
