"""The native library: finding it, its C structs, and calls that raise on error."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path

from octavo_kernels.registry import BackendUnavailableError

ABI_VERSION = 4
ENV_LIBRARY = "OCTAVO_CPU_LIBRARY"  # another build of the library, such as one with sanitizers
LIBRARY_PATH = Path(os.environ.get(ENV_LIBRARY) or Path(__file__).with_name("_octavo_cpu.so"))


class Codes(IntEnum):
    """How a matrix holds its codes (`oct_codes` of octavo_cpu.h)."""

    F32 = 0
    BF16 = 1
    U8 = 2
    U4 = 3
    U5 = 4
    U6 = 5
    U2 = 6
    NL4 = 7
    FP4 = 8


class Scales(IntEnum):
    """How codes become weights (`oct_scales`)."""

    NONE = 0
    D = 1
    DM = 2
    K_DM = 3
    K_D16 = 4
    K_DM16 = 5
    E8 = 6


class Activations(IntEnum):
    """What a matrix is multiplied with (`oct_activations`)."""

    FLOAT32 = 0
    INT8 = 1
    BFLOAT16 = 2


class Matrix(Structure):
    """`oct_matrix`."""

    _fields_ = (
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("code_kind", c_int32),
        ("scale_kind", c_int32),
        ("zero", c_int32),
        ("activations", c_int32),
    )


class KVCache(Structure):
    """`oct_kv_cache`."""

    _fields_ = (("key", c_void_p), ("value", c_void_p), ("key_scale", c_void_p), ("value_scale", c_void_p))


class Batch(Structure):
    """`oct_batch`."""

    _fields_ = (
        ("num_tokens", c_int64),
        ("num_seqs", c_int64),
        ("num_decodes", c_int64),
        ("max_blocks", c_int64),
        ("block_size", c_int64),
        ("num_blocks", c_int64),
        ("kv_dtype", c_int32),
        ("reserved", c_int32),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("slot_mapping", c_void_p),
        ("query_start_loc", c_void_p),
        ("seq_lens", c_void_p),
        ("block_tables", c_void_p),
        ("adapter_slots", c_void_p),
    )


class Attention(Structure):
    """`oct_attention`."""

    _fields_ = (
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("rotary_dim", c_int32),
        ("sliding_window", c_int32),
        ("bf16_products", c_int32),
        ("max_positions", c_int64),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("eps", c_float),
        ("row_norms", c_int32),
        ("cos_sin", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("sinks", c_void_p),
    )


MAX_PARTS = 3


class Layer(Structure):
    """`oct_layer`."""

    _fields_ = (
        ("attention", Attention),
        ("input_norm", c_void_p),
        ("post_attention_norm", c_void_p),
        ("attention_out_norm", c_void_p),
        ("mlp_out_norm", c_void_p),
        ("qkv_bias", c_void_p),
        ("output_bias", c_void_p),
        ("gate_up_bias", c_void_p),
        ("down_bias", c_void_p),
        ("qkv", Matrix * MAX_PARTS),
        ("output", Matrix),
        ("gate_up", Matrix * MAX_PARTS),
        ("down", Matrix),
        ("num_qkv", c_int32),
        ("num_gate_up", c_int32),
    )


class Model(Structure):
    """`oct_model`."""

    _fields_ = (
        ("hidden_size", c_int64),
        ("intermediate_size", c_int64),
        ("vocab_size", c_int64),
        ("num_layers", c_int64),
        ("layers", POINTER(Layer)),
        ("embedding", Matrix),
        ("lm_head", Matrix),
        ("final_norm", c_void_p),
        ("embedding_scale", c_float),
        ("eps", c_float),
        ("gelu", c_int32),
        ("final_soft_cap", c_float),
    )


class LowRank(Structure):
    """`oct_low_rank`."""

    _fields_ = (
        ("layer", c_int32),
        ("place", c_int32),
        ("first", c_int64),
        ("scale", c_float),
        ("reserved_f", c_float),
        ("down", Matrix),
        ("up", Matrix),
    )


_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "oct_abi_version": (c_int, ()),
    "oct_select_isa": (c_char_p, (c_char_p,)),
    "oct_isa": (c_char_p, ()),
    "oct_available_isas": (c_char_p, ()),
    "oct_has_bf16_dot": (c_int, ()),
    "oct_set_threads": (c_int, (c_int, c_int)),
    "oct_threads": (c_int, ()),
    "oct_alloc": (c_void_p, (c_int64,)),
    "oct_free": (None, (c_void_p,)),
    "oct_codes_bytes": (c_int64, (c_int, c_int64, c_int64)),
    "oct_scales_bytes": (c_int64, (c_int, c_int64, c_int64)),
    "oct_pack_gguf": (c_int, (c_int, c_void_p, POINTER(Matrix))),
    "oct_pack_dense": (c_int, (c_int, c_void_p, c_int64, POINTER(Matrix))),
    "oct_unpack_rows": (c_int, (POINTER(Matrix), c_void_p, c_int64, c_int64, c_void_p)),
    "oct_linear": (c_int, (POINTER(Matrix), c_void_p, c_int64, c_int64, c_void_p, c_void_p)),
    "oct_rms_norm": (c_int, (c_void_p, c_void_p, c_int64, c_int64, c_float, c_void_p)),
    "oct_gated": (c_int, (c_void_p, c_int64, c_int64, c_int, c_void_p)),
    "oct_rope_and_store": (
        c_int,
        (POINTER(Attention), POINTER(Batch), POINTER(KVCache), c_void_p, c_void_p, c_void_p),
    ),
    "oct_paged_attention": (c_int, (POINTER(Attention), POINTER(Batch), POINTER(KVCache), c_void_p, c_void_p)),
    "oct_sample": (c_int, (c_void_p, c_int64, c_int64, *(c_void_p,) * 7)),
    "oct_step_create": (c_void_p, (POINTER(Model),)),
    "oct_step_destroy": (None, (c_void_p,)),
    "oct_step_run": (c_int, (c_void_p, POINTER(Batch), c_void_p, c_void_p, c_int64, c_void_p)),
    "oct_step_place_adapter": (c_int, (c_void_p, c_int64, c_void_p, c_int64)),
    "oct_step_profile": (None, (c_void_p, c_int, POINTER(c_int64), c_int)),
    "oct_last_error": (c_char_p, ()),
}


class NativeError(RuntimeError):
    """The native library refused a call; the message says which value was out of range."""


def check(code: int) -> None:
    """Raise `NativeError` with the library's message unless `code` is 0."""
    if code != 0:
        raise NativeError(native.oct_last_error().decode())


def _load() -> ctypes.CDLL:
    if not LIBRARY_PATH.exists():
        raise BackendUnavailableError(
            f"{LIBRARY_PATH.name} was not built (no C++ compiler when Octavo was installed?): the CPU runs on plain "
            "torch, several times slower. Install g++ or clang++ and reinstall Octavo"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY_PATH))
    except OSError as error:
        raise BackendUnavailableError(f"{LIBRARY_PATH.name} cannot be loaded: {error}") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            raise BackendUnavailableError(f"{LIBRARY_PATH.name} lacks {name}: it is older than this code, reinstall")
        function.restype, function.argtypes = result, arguments
        if name == "oct_abi_version" and function() != ABI_VERSION:
            raise BackendUnavailableError(
                f"{LIBRARY_PATH.name} has interface version {function()}, this code needs {ABI_VERSION}: reinstall"
            )
    return library


native = _load()
