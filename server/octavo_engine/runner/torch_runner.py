"""The runner: a loaded model, its paged KV cache, and one call that computes a mixed batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from octavo_engine.errors import ConfigError, InvalidRequestError, ModelLoadError
from octavo_engine.kv.transfers import Transfer
from octavo_engine.lora.adapter import Adapter
from octavo_engine.lora.layers import AdaptedModel
from octavo_engine.lora.peft_files import read_adapter
from octavo_engine.messages import ModelInfo
from octavo_engine.models.interface import Model
from octavo_engine.runner.batch_builder import build_packed, build_step, token_types
from octavo_engine.runner.cuda_graphs import DecodeGraphs, capture_cuda_graph
from octavo_engine.runner.host_cache import HostCache
from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.runner.pair_batch import with_token_types
from octavo_engine.runner.pooling import Pool
from octavo_kernels import ops, registry
from octavo_kernels.batch import PagedKVCache
from octavo_kernels.step import CompiledStep, compile_step

# (cached tokens, new tokens). GPU kernels are compiled for each kind of step when it is first met: a decode, short and
# long prompts, a chunk after a long prefix, drafts to verify after one.
_WARM_UP_STEPS = ((0, 1), (0, 17), (0, 64), (0, 600), (2000, 64), (2000, 5))


class TorchModelRunner:
    """Runs a model through `octavo_kernels`; a backend that compiles whole steps takes over if it can."""

    def __init__(
        self,
        model: Model,
        info: ModelInfo,
        kv_dtype: torch.dtype,
        pool: Pool,
        adapted: AdaptedModel | None = None,
    ) -> None:
        self.model = model
        self._info = info
        self._device = torch.device(info.device)
        self._kv_dtype = kv_dtype
        self._pool = pool
        self._caches: list[PagedKVCache] = []
        self._host_cache = HostCache([])
        self._step: CompiledStep | None = None
        self._graphs: DecodeGraphs | None = None
        self._step_backend = ""
        self._adapted = adapted
        self._adapted_graphs: DecodeGraphs | None = None

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def compiled_step(self) -> CompiledStep | None:
        """What runs whole steps here natively, None where layers run op by op or as CUDA graphs."""
        return self._step

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Allocate the block pool's memory; raises `ConfigError` when it does not fit."""
        self._caches = []
        needed = num_blocks * self._info.kv_block_size * self._info.kv_bytes_per_token
        if num_blocks < 1:
            raise ConfigError(f"num_kv_blocks: must be at least 1, got {num_blocks}")
        try:
            self._caches = [
                self._new_cache(num_blocks, self._device) for _ in range(self.model.cache_layout.num_layers)
            ]
        except (OSError, RuntimeError) as error:  # how the system and torch report exhausted memory
            raise ConfigError(
                f"num_kv_blocks: {num_blocks} blocks need {needed / 2**30:.1f} GiB on {self._device}, "
                "which is not free; lower num_kv_blocks, max_model_len or kv_cache_memory_fraction"
            ) from error
        self._compile()
        self._info = msgspec.structs.replace(self._info, kv_blocks_total=num_blocks)

    def allocate_host_cache(self, num_blocks: int) -> None:
        self._host_cache = HostCache([self._new_cache(num_blocks, torch.device("cpu")) for _ in self._caches])
        self._info = msgspec.structs.replace(self._info, kv_host_blocks=num_blocks)

    @torch.inference_mode()
    def move_blocks(self, transfer: Transfer) -> None:
        self._host_cache.move(transfer, self._caches)

    @torch.inference_mode()
    def forward(self, slices: Sequence[SequenceSlice], sampled: torch.Tensor | None = None) -> torch.Tensor:
        if not slices:
            return self._nothing()
        inputs = build_step(slices, self._info.kv_block_size, self._device, sampled)
        model, graphs, slots = self.model, self._graphs, inputs.adapter_slots
        if slots is not None and self._adapted is None:
            raise InvalidRequestError("model: this engine runs without adapters", "model")
        if self._step is not None:
            return self._step(inputs.token_ids, inputs.batch, self._caches, inputs.logits_indices, slots)
        if slots is not None and self._adapted is not None:
            self._adapted.active.set(slots)
            model, graphs = self._adapted.model, self._adapted_graphs
        if graphs is not None:
            return graphs(inputs.token_ids, inputs.batch, self._caches, inputs.logits_indices)
        hidden = model.forward(inputs.token_ids, inputs.batch, self._caches)
        if not self.model.rank.is_last_stage:
            return self._nothing()
        return model.logits(hidden[inputs.logits_indices])

    def read_adapter(self, name: str, path: Path, max_rank: int) -> Adapter:
        if self._adapted is None:
            raise ModelLoadError(f"{path}: this engine runs without adapters; start it with enable_lora")
        return read_adapter(name, path, self._adapted.targets, max_rank, self._adapted.dtype)

    @torch.inference_mode()
    def place_adapter(self, slot: int, adapter: Adapter) -> None:
        if self._adapted is None:
            return
        if self._step is not None:
            self._step.place_adapter(slot, self._adapted.changes(adapter))
        else:
            self._adapted.place(slot, adapter)

    @torch.inference_mode()
    def embed(self, prompts: Sequence[Sequence[int]], second_starts: Sequence[int] = ()) -> torch.Tensor:
        if not prompts or not all(prompts):
            raise InvalidRequestError("input: every text must have at least one token", "input")
        token_ids, batch = build_packed(prompts, self._device)
        if self.model.has_token_types and any(second_starts):
            batch = with_token_types(batch, token_types(prompts, second_starts).to(self._device))
        hidden = self.model.forward(token_ids, batch, [None] * self.model.cache_layout.num_layers)
        return self._pool(hidden, batch.query_start_loc) if self.model.rank.is_last_stage else self._nothing()

    def _nothing(self) -> torch.Tensor:
        return torch.empty((0, self._info.vocab_size), device=self._device)

    @torch.inference_mode()
    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        if not pairs:
            return
        sources, destinations = torch.tensor(pairs, dtype=torch.int64, device=self._device).unbind(1)
        for cache in self._caches:
            ops.copy_blocks(cache, sources, destinations)

    def heartbeat(self) -> None:
        """There is nothing beside this process that could be lost."""

    def warm_up(self) -> None:
        """Run the first steps, so that no request pays for lazy initialisation."""
        block_size, total = self._info.kv_block_size, self._info.kv_blocks_total
        capacity = min(block_size * total, self._info.max_model_len)
        for cached, length in _WARM_UP_STEPS if self._device.type == "cuda" else _WARM_UP_STEPS[:2]:
            if self._info.task != "generate":
                self.embed([[0] * length])
            elif cached + length <= capacity:
                blocks = range(-(-(cached + length) // block_size))
                for slot in (None,) if self._adapted is None else (None, 0):
                    self.forward([SequenceSlice([0] * length, cached, blocks, 1, slot)])
        self._info = msgspec.structs.replace(self._info, backend=self._describe_backend())

    def record_phases(self, seconds: dict[str, float]) -> None:
        """Keep how long each phase of start-up took."""
        self._info = msgspec.structs.replace(self._info, phase_seconds=seconds)

    def _new_cache(self, num_blocks: int, device: torch.device) -> PagedKVCache:
        return self.model.cache_layout.new_cache(num_blocks, self._info.kv_block_size, self._kv_dtype, device)

    def _compile(self) -> None:
        plan = self.model.plan()
        compiled = compile_step(plan) if plan is not None else None
        self._step = compiled[1] if compiled else None
        self._step_backend = ""
        if compiled is not None:
            detail = registry.load_backend(compiled[0]).detail
            self._step_backend = f"{compiled[0]} (whole step; {detail})"
            if self._adapted is not None:
                self._adapted.release()
                self._info = msgspec.structs.replace(self._info, adapter_bytes=self._adapted.nbytes)
        if compiled is not None and self._device.type == "cpu":
            # Little is left to torch, and its threads spin after each parallel op, on cores that the step wants next.
            torch.set_num_threads(1)
        alone = self._info.num_ranks == 1  # graphs would have to record what ranks say to each other
        if compiled is None and self._device.type == "cuda" and self._info.task == "generate" and alone:
            self._graphs = self._decode_graphs(self.model)
            if self._adapted is not None:
                self._adapted_graphs = self._decode_graphs(self._adapted.model)

    def _decode_graphs(self, model: Model) -> DecodeGraphs:
        longest = self._info.max_model_len
        return DecodeGraphs(model.forward, model.logits, longest, self._device, capture_cuda_graph())

    def _describe_backend(self) -> str:
        if self._step_backend:
            return self._step_backend
        used = {choice.backend for choice in registry.choices() if choice.device == self._device.type}
        if self._graphs is not None:
            used.add(f"no CUDA graphs: {self._graphs.unavailable}" if self._graphs.unavailable else "CUDA graphs")
        return ", ".join(sorted(used))
