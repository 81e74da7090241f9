"""How many KV blocks a replica gets."""

from __future__ import annotations

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_engine.messages import ModelInfo
from octavo_engine.models.config import ModelConfig

GIB = 1 << 30
CPU_CACHE_CAP_BYTES = 2 * GIB
CPU_HEADROOM_BYTES = GIB // 2


def activation_bytes(config: EngineConfig, model: ModelConfig, itemsize: int, max_num_tokens: int) -> int:
    """Peak of a step: streams, projections and MLP of its tokens in one layer, and float32 logits, sampled twice over.

    An estimate: it depends on which kernels fuse what. itemsize: bytes of an activation.
    """
    tensor = config.tensor_parallel_size
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim // tensor
    width = 4 * model.hidden_size + heads + 3 * model.intermediate_size // tensor
    return max_num_tokens * width * itemsize + 2 * config.max_num_seqs * model.vocab_size * 4


def num_kv_blocks(config: EngineConfig, model: ModelInfo, free_bytes: int, reserved_bytes: int = 0) -> int:
    """Blocks that fit the settings: `num_kv_blocks`, else `kv_cache_memory_bytes`, else a share of free memory.

    `free_bytes` is what the device has left after the weights; of it a GPU's activations need `reserved_bytes`. On a
    CPU the share is taken of memory that others may want too, so it is capped. Never more than every sequence at full
    length could use. Raises `ConfigError` with what is needed, what there is and what to change when not even one
    sequence of `max_model_len` fits.
    """
    if config.num_kv_blocks:
        return config.num_kv_blocks
    bytes_per_block = model.kv_bytes_per_token * model.kv_block_size
    if bytes_per_block <= 0:
        return 0
    blocks_per_sequence = -(-model.max_model_len // model.kv_block_size)
    useful = config.max_num_seqs * blocks_per_sequence
    budget = config.kv_cache_memory_bytes or _share_of_free(config, model, free_bytes, reserved_bytes)
    blocks = min(budget // bytes_per_block, useful)
    if blocks < min(blocks_per_sequence, useful) and blocks * model.kv_block_size < _shortest_useful(config, model):
        raise ConfigError(
            f"KV cache: one sequence of {model.max_model_len} tokens needs "
            f"{blocks_per_sequence * bytes_per_block / GIB:.2f} GiB, have {budget / GIB:.2f} GiB; "
            f"set max_model_len to at most {max(0, blocks) * model.kv_block_size}, use a smaller kv_cache_dtype, "
            "or give the replica more memory"
        )
    return int(blocks)


def num_host_blocks(config: EngineConfig, model: ModelInfo, free_bytes: int) -> int:
    """Blocks that fit `kv_host_memory_bytes`; raises `ConfigError` where the machine has less memory free than that."""
    if config.kv_host_memory_bytes > free_bytes:
        raise ConfigError(
            f"kv_host_memory_bytes: {config.kv_host_memory_bytes / GIB:.2f} GiB do not fit, "
            f"{free_bytes / GIB:.2f} GiB are free; lower it or give the replica more memory"
        )
    needed = model.kv_bytes_per_token * model.kv_block_size * config.num_ranks
    blocks = config.kv_host_memory_bytes // needed
    if blocks < 1:
        raise ConfigError(
            f"kv_host_memory_bytes: a block of {needed} bytes does not fit {config.kv_host_memory_bytes}; "
            "give at least as many, or 0 for none"
        )
    return blocks


def _shortest_useful(config: EngineConfig, model: ModelInfo) -> int:
    """A length the operator asked for must fit; a length that only the checkpoint allows may be cut down to 512."""
    return model.max_model_len if config.max_model_len else min(model.max_model_len, 512)


def _share_of_free(config: EngineConfig, model: ModelInfo, free_bytes: int, reserved_bytes: int) -> int:
    share = int(free_bytes * config.kv_cache_memory_fraction)
    if model.device.startswith("cpu"):
        return max(0, min(share // 2, free_bytes - CPU_HEADROOM_BYTES, CPU_CACHE_CAP_BYTES))
    return max(0, min(share, free_bytes - reserved_bytes))
