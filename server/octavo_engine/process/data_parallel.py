"""Several whole engines behind one server: each request goes to one of them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from zlib import crc32

import msgspec
import numpy as np
import torch

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError, QueueFullError
from octavo_engine.messages import AdapterStats, EngineStats, LoadProgress, ModelInfo, SchedulerSnapshot, SequenceOutput
from octavo_engine.process.client import EngineProcessClient
from octavo_engine.runner.machine import choose_device, usable_cpus
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.startup import LoadRunner

_PREFIX_TOKENS = 64
_SLACK = 2  # requests more than the least busy engine that a shared prefix is worth
_MEANS = frozenset({"step_time_s", "roofline_decode", "roofline_prefill"})
_LARGEST = frozenset({"step", "time", "retry_after_s", "queued_work_s"})


class DataParallelClient:
    """`data_parallel_size` engines, each with its own scheduler and cache; implements `EngineClient`.

    The replica is as healthy as its least healthy engine: whoever supervises it starts all of them anew.
    """

    def __init__(self, config: EngineConfig, load: LoadRunner | None = None) -> None:
        config.validate()
        self._loads = [0] * config.data_parallel_size
        self._engines = [
            EngineProcessClient(engine_config(config), load, environment=engine_gpus(config, index))
            for index in range(config.data_parallel_size)
        ]

    @property
    def model(self) -> ModelInfo:
        """The first engine's, with the KV blocks and ranks of all."""
        infos = [engine.model for engine in self._engines]
        return msgspec.structs.replace(
            infos[0],
            kv_blocks_total=sum(info.kv_blocks_total for info in infos),
            num_ranks=sum(info.num_ranks for info in infos),
            backend=f"{infos[0].backend}; {len(infos)} engines",
        )

    @property
    def stats(self) -> EngineStats:
        return merge_stats([engine.stats for engine in self._engines])

    @property
    def progress(self) -> LoadProgress | None:
        """That of the first engine that is not ready."""
        return next((engine.progress for engine in self._engines if engine.progress is not None), None)

    @property
    def engines(self) -> tuple[EngineProcessClient, ...]:
        return tuple(self._engines)

    async def start(self) -> None:
        """All engines at once; the first error ends the others."""
        starting = [asyncio.create_task(engine.start()) for engine in self._engines]
        try:
            await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            await self.shutdown(timeout_s=1.0)
            raise

    def check_health(self) -> None:
        for engine in self._engines:
            engine.check_health()

    def check_room(self) -> None:
        """Room in one engine is enough."""
        for index, engine in enumerate(self._engines):
            try:
                engine.check_room()
            except QueueFullError:
                if index + 1 == len(self._engines):
                    raise
            else:
                return

    async def generate(
        self,
        *,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        tenant: str = "",
        cache_salt: str = "",
        priority: int = 0,
        deadline_s: float | None = None,
        adapter: str = "",
        output_token_ids: Sequence[int] = (),
        prefix_labels: Sequence[tuple[int, int]] = (),
    ) -> AsyncIterator[SequenceOutput]:
        index = choose_engine(self._loads, prompt_token_ids, cache_salt + adapter)
        stream = self._engines[index].generate(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            sampling=sampling,
            tenant=tenant,
            cache_salt=cache_salt,
            priority=priority,
            deadline_s=deadline_s,
            adapter=adapter,
            output_token_ids=output_token_ids,
            prefix_labels=prefix_labels,
        )
        self._loads[index] += 1
        try:
            async for output in stream:
                yield output
        finally:
            self._loads[index] -= 1
            await stream.aclose()

    async def embed(
        self, *, request_id: str, prompt_token_ids: list[int], second_start: int = 0, tenant: str = ""
    ) -> SequenceOutput:
        index = min(range(len(self._loads)), key=self._loads.__getitem__)
        self._loads[index] += 1
        try:
            return await self._engines[index].embed(
                request_id=request_id, prompt_token_ids=prompt_token_ids, second_start=second_start, tenant=tenant
            )
        finally:
            self._loads[index] -= 1

    async def load_adapter(self, *, request_id: str, name: str, path: str, replace: bool = False) -> None:
        """On every engine, or on none: where one refuses, the others let go of it again."""
        loading = (
            engine.load_adapter(request_id=request_id, name=name, path=path, replace=replace)
            for engine in self._engines
        )
        results = await asyncio.gather(*loading, return_exceptions=True)
        refusal = next((result for result in results if isinstance(result, BaseException)), None)
        if refusal is None:
            return
        loaded = [engine for engine, result in zip(self._engines, results, strict=True) if result is None]
        undoing = (engine.unload_adapter(request_id=f"{request_id}-undo", name=name) for engine in loaded)
        await asyncio.gather(*undoing, return_exceptions=True)
        raise refusal

    async def unload_adapter(self, *, request_id: str, name: str) -> None:
        await asyncio.gather(*(engine.unload_adapter(request_id=request_id, name=name) for engine in self._engines))

    async def snapshot(self, *, request_id: str) -> list[SchedulerSnapshot]:
        taken = await asyncio.gather(*(engine.snapshot(request_id=request_id) for engine in self._engines))
        return [snapshot for snapshots in taken for snapshot in snapshots]

    async def shutdown(self, timeout_s: float) -> None:
        await asyncio.gather(*(engine.shutdown(timeout_s) for engine in self._engines))


def choose_engine(loads: Sequence[int], prompt: Sequence[int], cache_salt: str) -> int:
    """Prompts that begin alike go to one engine, where their prefix is cached, until it is busier than others."""
    head = np.asarray(prompt[:_PREFIX_TOKENS], dtype=np.int64).tobytes() + cache_salt.encode()
    preferred, least = crc32(head) % len(loads), min(loads)
    return preferred if loads[preferred] <= least + _SLACK else loads.index(least)


def merge_stats(stats: Sequence[EngineStats]) -> EngineStats:
    """Counts are added, times are those of the slowest, shares are means."""
    merged: dict[str, object] = {}
    for name in EngineStats.__struct_fields__:
        values = [getattr(item, name) for item in stats]
        if name == "spec_unavailable":
            merged[name] = next(filter(None, values), "")
        elif name == "adapters":
            merged[name] = _merge_adapters([item.adapters for item in stats])
        elif isinstance(values[0], dict):
            keys = {key for value in values for key in value}
            merged[name] = {key: sum(value.get(key, 0) for value in values) for key in sorted(keys)}
        elif name in _LARGEST:
            merged[name] = max(values)
        else:
            merged[name] = sum(values) / (len(values) if name in _MEANS else 1)
    return msgspec.convert(merged, EngineStats, strict=False, from_attributes=True)


def _merge_adapters(by_engine: Sequence[Sequence[AdapterStats]]) -> list[AdapterStats]:
    """Adapters that every engine has."""
    merged = []
    for first in by_engine[0]:
        same = [adapter for adapters in by_engine for adapter in adapters if adapter.name == first.name]
        if len(same) == len(by_engine):
            merged.append(
                msgspec.structs.replace(
                    first,
                    is_resident=any(adapter.is_resident for adapter in same),
                    is_leaving=any(adapter.is_leaving for adapter in same),
                    num_running=sum(adapter.num_running for adapter in same),
                    num_waiting=sum(adapter.num_waiting for adapter in same),
                )
            )
    return merged


def engine_config(config: EngineConfig) -> EngineConfig:
    """One engine's share of the processors. Raises `ConfigError` for what only one engine can have."""
    if config.kv_events_endpoint:
        raise ConfigError("kv_events_endpoint: several engines cannot publish on one address; use data_parallel_size=1")
    count = config.data_parallel_size
    threads = config.num_threads or max(1, usable_cpus() // count)
    fraction = config.kv_cache_memory_fraction
    if choose_device(config.device).type == "cpu":  # they measure the same free memory
        fraction /= count
    return msgspec.structs.replace(
        config,
        data_parallel_size=1,
        num_threads=threads,
        kv_cache_memory_fraction=fraction,
        kv_host_memory_bytes=config.kv_host_memory_bytes // count,
    )


def engine_gpus(config: EngineConfig, index: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variable that shows an engine its own GPUs only; nothing without GPUs."""
    if choose_device(config.device).type == "cpu":
        return {}
    named = environment.get("CUDA_VISIBLE_DEVICES", "")
    gpus = named.split(",") if named else [str(gpu) for gpu in range(torch.cuda.device_count())]
    needed = config.num_ranks * config.data_parallel_size
    if needed > len(gpus):
        raise ConfigError(
            f"data_parallel_size: {config.data_parallel_size} engines of {config.num_ranks} ranks need {needed} GPUs, "
            f"have {len(gpus)}"
        )
    own = gpus[index * config.num_ranks : (index + 1) * config.num_ranks]
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}
