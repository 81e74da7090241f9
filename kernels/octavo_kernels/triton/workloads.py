"""Representative calls of every op: what the benchmark times, the tuner tunes, and the offline compiler compiles.

Shapes are those of Llama-3-8B (Q, K, V 32/8 heads of 128, hidden 4096, intermediate 14336), Qwen3-30B-A3B (128 experts
of 768), DeepSeek-V3's latent attention and gpt-oss's heads of 64, unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from octavo_kernels import ops
from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.expert_weights import ExpertWeight
from octavo_kernels.quantized_weights import Fp8Weight
from octavo_kernels.triton.packed_weight import PackedWeight

BLOCK_SIZE = 16
BF16, FP8, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8
HIDDEN, INTERMEDIATE, VOCAB = 4096, 14336, 128256


@dataclass(frozen=True, slots=True)
class Call:
    """A prepared call. bytes: least that must move; flops: least that must be computed, in matrix products. peers: the
    same work through torch's own kernels, where there is such a thing. reset: undoes what a run changed in its inputs
    so that the next gives the same result."""

    run: Callable[[], object]
    bytes: int
    flops: int = 0
    peers: tuple[tuple[str, Callable[[], object]], ...] = ()
    reset: Callable[[], object] = lambda: None


@dataclass(frozen=True, slots=True)
class Workload:
    """A named call that is prepared on demand, so that one workload's memory is free before the next."""

    name: str
    prepare: Callable[[torch.device], Call]


def workloads() -> list[Workload]:
    """Everything, rows first, then attention, products, experts, sampling."""
    return [*_rows(), *_attention(), *_products(), *_experts(), *_sampling()]


def _randn(device: torch.device, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    if dtype == INT8:
        return torch.randint(-127, 128, shape, dtype=INT8, device=device)
    return torch.randn(shape, device=device, dtype=torch.float32 if dtype == FP8 else dtype).to(dtype)


def _rows() -> list[Workload]:
    def rms(tokens: int) -> Callable[[torch.device], Call]:
        def prepare(device: torch.device) -> Call:
            x, weight = _randn(device, tokens, HIDDEN), _randn(device, HIDDEN)
            peer = ("torch rms_norm", lambda: torch.nn.functional.rms_norm(x, (HIDDEN,), weight, 1e-5))
            return Call(lambda: ops.rms_norm(x, weight, 1e-5), 2 * x.nbytes, peers=(peer,))

        return prepare

    def add_rms(tokens: int, dtype: torch.dtype | None) -> Callable[[torch.device], Call]:
        def prepare(device: torch.device) -> Call:
            x, residual, weight = (_randn(device, *shape) for shape in ((tokens, HIDDEN), (tokens, HIDDEN), (HIDDEN,)))
            if dtype is None:
                return Call(lambda: ops.add_rms_norm(x, residual, weight, 1e-5), 4 * x.nbytes)
            moved = 3 * x.nbytes + x.numel()
            return Call(lambda: ops.add_rms_norm_quantize(x, residual, weight, 1e-5, dtype), moved)

        return prepare

    def silu(tokens: int, dtype: torch.dtype | None) -> Callable[[torch.device], Call]:
        def prepare(device: torch.device) -> Call:
            x = _randn(device, tokens, 2 * INTERMEDIATE)
            if dtype is None:
                return Call(lambda: ops.silu_and_mul(x), 3 * x.nbytes // 2)
            return Call(lambda: ops.silu_and_mul_quantize(x, dtype), x.nbytes + x.numel() // 2)

        return prepare

    def rope(tokens: int, kv_dtype: torch.dtype, normed: bool) -> Callable[[torch.device], Call]:
        def prepare(device: torch.device) -> Call:
            qkv = _randn(device, tokens, 48, 128)
            query, key, value = qkv.split([32, 8, 8], dim=1)
            cache = new_cache(device, tokens // BLOCK_SIZE + 1, 8, 128, kv_dtype)
            positions = torch.arange(tokens, device=device)
            cos_sin = torch.randn(tokens, 128, device=device)
            norm = _randn(device, 128) if normed else None
            moved = qkv.nbytes + query.nbytes + key.nbytes + 2 * key.numel() * kv_dtype.itemsize
            return Call(
                lambda: ops.rope_and_store_kv(query, key, value, positions, positions, cache, cos_sin, norm, norm),
                moved,
            )

        return prepare

    return [
        Workload("rms_norm 8192", rms(8192)),
        Workload("add_rms_norm 64", add_rms(64, None)),
        Workload("add_rms_norm 8192", add_rms(8192, None)),
        Workload("add_rms_norm_quantize 8192 fp8", add_rms(8192, FP8)),
        Workload("silu_and_mul 64", silu(64, None)),
        Workload("silu_and_mul 8192", silu(8192, None)),
        Workload("silu_and_mul_quantize 8192 int8", silu(8192, INT8)),
        Workload("rope_and_store_kv 64", rope(64, BF16, False)),
        Workload("rope_and_store_kv 8192", rope(8192, BF16, False)),
        Workload("rope_and_store_kv 8192 qk-norm fp8", rope(8192, FP8, True)),
    ]


def new_cache(device: torch.device, num_blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> PagedKVCache:
    """A filled cache."""
    shape = (num_blocks, kv_heads, BLOCK_SIZE, head_dim)
    key, value = _randn(device, *shape, dtype=dtype), _randn(device, *shape, dtype=dtype)
    if dtype not in (INT8, FP8):
        return PagedKVCache(key, value)
    scales = [torch.rand(shape[:3], device=device) / (127 if dtype == INT8 else 1) for _ in range(2)]
    return PagedKVCache(key, value, *scales)


def new_batch(device: torch.device, lengths: Sequence[tuple[int, int]], shared: int = 0) -> AttentionBatch:
    """A batch of (new tokens, length after the step), single tokens first, over shuffled blocks; the first `shared`
    tokens of all sequences lie in the same blocks."""
    needed = [-(-length // BLOCK_SIZE) for _, length in lengths]
    tables = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    order = torch.randperm(sum(needed)).int()
    used = 0
    for row, count in enumerate(needed):
        tables[row, :count] = order[used : used + count]
        used += count
    tables[:, : shared // BLOCK_SIZE] = tables[0, : shared // BLOCK_SIZE]
    starts = torch.tensor([0, *torch.tensor([new for new, _ in lengths]).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(length - new, length) for new, length in lengths])
    owner = torch.repeat_interleave(torch.arange(len(lengths)), starts.diff())
    slots = tables[owner, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    return AttentionBatch(
        positions=positions.to(device),
        slot_mapping=slots.to(device),
        query_start_loc=starts.to(device),
        seq_lens=torch.tensor([length for _, length in lengths], dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        num_decodes=sum(new == 1 for new, _ in lengths),
        max_query_len=max(new for new, _ in lengths),
        max_seq_len=max(length for _, length in lengths),
    )


def _attention() -> list[Workload]:
    def paged(
        lengths: list[tuple[int, int]],
        kv_dtype: torch.dtype = BF16,
        heads: tuple[int, int, int] = (32, 8, 128),
        window: int = 0,
        soft_cap: float = 0.0,
        with_sinks: bool = False,
        shared: int = 0,
    ) -> Callable[[torch.device], Call]:
        def prepare(device: torch.device) -> Call:
            num_heads, kv_heads, head_dim = heads
            batch = new_batch(device, lengths, shared)
            blocks = sum(-(-length // BLOCK_SIZE) for _, length in lengths)
            cache = new_cache(device, blocks, kv_heads, head_dim, kv_dtype)
            query = _randn(device, batch.num_tokens, num_heads, head_dim)
            sinks = _randn(device, num_heads) if with_sinks else None
            scale = head_dim**-0.5
            read = sum(min(length, window + new if window else length) for new, length in lengths)
            if shared:
                read -= shared * (len(lengths) - 1)
            pairs = sum(new * length - new * (new - 1) // 2 for new, length in lengths)
            item = kv_dtype.itemsize + (4 / head_dim if kv_dtype in (INT8, FP8) else 0)
            moved = int(2 * read * kv_heads * head_dim * item) + 2 * query.nbytes
            flops = 0 if window else 4 * pairs * num_heads * head_dim
            if shared:
                common = shared // BLOCK_SIZE
                return Call(lambda: ops.cascade_attention(query, cache, batch, common, scale), moved, flops)
            peers = _sdpa_peer(device, lengths, heads) if not window and not soft_cap and not with_sinks else ()
            return Call(
                lambda: ops.paged_attention(query, cache, batch, scale, window, soft_cap, sinks), moved, flops, peers
            )

        return prepare

    def latent(sequences: int, length: int) -> Callable[[torch.device], Call]:
        def prepare(device: torch.device) -> Call:
            batch = new_batch(device, [(1, length)] * sequences)
            cache = _randn(device, sequences * length // BLOCK_SIZE, BLOCK_SIZE, 576)
            query = _randn(device, sequences, 128, 576)
            flops = 2 * sequences * length * 128 * (576 + 512)
            return Call(lambda: ops.mla_attention(query, cache, batch, 0.07, 512), cache.nbytes, flops)

        return prepare

    def packed(sequences: int, length: int) -> Callable[[torch.device], Call]:
        def prepare(device: torch.device) -> Call:
            qkv = _randn(device, sequences * length, 36, 64)
            query, key, value = qkv.split([12, 12, 12], dim=1)
            starts = torch.arange(0, (sequences + 1) * length, length, dtype=torch.int32, device=device)
            flops = 4 * sequences * length * length * 12 * 64
            return Call(lambda: ops.varlen_attention(query, key, value, starts, 0.125, False), qkv.nbytes, flops)

        return prepare

    return [
        Workload("decode 1 x 4k", paged([(1, 4096)])),
        Workload("decode 1 x 128k", paged([(1, 131072)])),
        Workload("decode 64 x 4k", paged([(1, 4096)] * 64)),
        Workload("decode 256 x 1k", paged([(1, 1024)] * 256)),
        Workload("decode 64 x 4k fp8", paged([(1, 4096)] * 64, FP8)),
        Workload("decode 64 x 4k int8", paged([(1, 4096)] * 64, INT8)),
        Workload("decode 64 x 4k heads of 256, soft cap", paged([(1, 4096)] * 64, BF16, (16, 8, 256), soft_cap=50.0)),
        Workload("decode 64 x 4k heads of 64, window, sinks", paged([(1, 4096)] * 64, BF16, (64, 8, 64), 128, 0, True)),
        Workload("decode 64 x 4k, 3k shared", paged([(1, 4096)] * 64, shared=3072)),
        Workload("verify 16 x 5 at 8k", paged([(5, 8192)] * 16)),
        Workload("prefill 1 x 8k", paged([(8192, 8192)])),
        Workload("prefill 8 x 2k", paged([(2048, 2048)] * 8)),
        Workload("prefill 2 x 400", paged([(400, 400)] * 2)),
        Workload("prefill 2k after 30k", paged([(2048, 32768)])),
        Workload("prefill 8 x 2k fp8", paged([(2048, 2048)] * 8, FP8)),
        Workload("prefill 8 x 2k heads of 64", paged([(2048, 2048)] * 8, BF16, (9, 3, 64))),
        Workload("mixed 63 decodes at 4k, 1 x 2k", paged([*[(1, 4096)] * 63, (2048, 2048)])),
        Workload("packed 32 x 512, not causal", packed(32, 512)),
        Workload("mla 64 x 4k", latent(64, 4096)),
    ]


def _sdpa_peer(
    device: torch.device, lengths: list[tuple[int, int]], heads: tuple[int, int, int]
) -> tuple[tuple[str, Callable[[], object]], ...]:
    """torch's flash attention on dense keys, where one call can express the batch."""
    new, length = lengths[0]
    if len(set(lengths)) > 1 or new not in (1, length):
        return ()
    num_heads, kv_heads, head_dim = heads
    query = _randn(device, len(lengths), num_heads, new, head_dim)
    key, value = (_randn(device, len(lengths), kv_heads, length, head_dim) for _ in range(2))
    attend = torch.nn.functional.scaled_dot_product_attention
    return (("torch SDPA, dense", lambda: attend(query, key, value, is_causal=new > 1, enable_gqa=True)),)


def _products() -> list[Workload]:
    def packed(kind: str, rows: int, outputs: int, inputs: int) -> Callable[[torch.device], Call]:
        def prepare(device: torch.device) -> Call:
            weight = random_packed(kind, device, outputs, inputs)
            x, dense = _randn(device, rows, inputs), _randn(device, outputs, inputs)
            peer = ("cuBLAS bf16", lambda: torch.nn.functional.linear(x, dense))
            moved = weight.nbytes + 2 * rows * (inputs + outputs)
            return Call(lambda: ops.linear(x, weight), moved, 2 * rows * outputs * inputs, (peer,))

        return prepare

    def float8(blockwise: bool, rows: int, outputs: int, inputs: int) -> Callable[[torch.device], Call]:
        def prepare(device: torch.device) -> Call:
            scale = torch.rand((outputs // 128, inputs // 128) if blockwise else (outputs,), device=device)
            weight = Fp8Weight(_randn(device, outputs, inputs, dtype=FP8), scale)
            x, dense = _randn(device, rows, inputs), _randn(device, outputs, inputs)
            peer = ("cuBLAS bf16", lambda: torch.nn.functional.linear(x, dense))
            moved = weight.nbytes + 2 * rows * (inputs + outputs)
            return Call(lambda: ops.linear(x, weight), moved, 2 * rows * outputs * inputs, (peer,))

        return prepare

    def dense(rows: int, outputs: int, inputs: int) -> Callable[[torch.device], Call]:
        def prepare(device: torch.device) -> Call:
            x, weight = _randn(device, rows, inputs), _randn(device, outputs, inputs)
            peer = ("cuBLAS bf16", lambda: torch.nn.functional.linear(x, weight))
            moved = weight.nbytes + 2 * rows * (inputs + outputs)
            return Call(lambda: ops.linear(x, weight), moved, 2 * rows * outputs * inputs, (peer,))

        return prepare

    def scaled(dtype: torch.dtype, rows: int) -> Callable[[torch.device], Call]:
        def prepare(device: torch.device) -> Call:
            x, weight = _randn(device, rows, HIDDEN, dtype=dtype), _randn(device, HIDDEN, HIDDEN, dtype=dtype)
            x_scale, scale = torch.rand(rows, device=device), torch.rand(HIDDEN, device=device)
            peers: tuple[tuple[str, Callable[[], object]], ...] = ()
            if dtype == FP8:
                by_row = (x_scale.unsqueeze(1), scale.unsqueeze(0))
                peers = (("torch scaled_mm", lambda: torch._scaled_mm(x, weight.t(), *by_row, out_dtype=BF16)),)
            run = lambda: ops.scaled_linear(x, x_scale, weight, scale, BF16)  # noqa: E731
            return Call(run, x.nbytes + weight.nbytes + 2 * rows * HIDDEN, 2 * rows * HIDDEN * HIDDEN, peers)

        return prepare

    kinds = ("int4-g128", "Q4_0", "Q4_K", "Q6_K", "Q8_0", "MXFP4", "int8")
    small = [Workload(f"{kind} {m} rows", packed(kind, m, 14336, 4096)) for kind in kinds for m in (1, 16, 64)]
    fp8 = [
        Workload(f"fp8{' block' if blockwise else ''} {m} rows", float8(blockwise, m, 14336, 4096))
        for blockwise in (False, True)
        for m in (1, 64, 4096)
    ]
    shapes = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (VOCAB, 4096))  # an 8B layer, and its head
    wide = [Workload(f"dense {m} rows {n}x{k}", dense(m, n, k)) for m in (1, 64) for n, k in shapes]
    return [
        *wide,
        *small,
        Workload("int4-g128 4096 rows", packed("int4-g128", 4096, 14336, 4096)),
        *fp8,
        Workload("int8 x int8 4096 rows", scaled(INT8, 4096)),
        Workload("fp8 x fp8 4096 rows", scaled(FP8, 4096)),
    ]


def random_packed(kind: str, device: torch.device, outputs: int, inputs: int) -> PackedWeight:
    """A packed weight of random codes and small scales."""

    def codes(columns: int, segment: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        low = -128 if dtype == INT8 else 0
        shape = (columns // segment, outputs, segment)
        return torch.randint(low, low + 256, shape, dtype=dtype, device=device)

    def scales(columns: int) -> torch.Tensor:
        return torch.rand(columns, outputs, device=device) / 100

    def with_minima(columns: int) -> torch.Tensor:
        return torch.stack((scales(columns), scales(columns)), -1).half().view(torch.int32).squeeze(-1)

    row_scale = 0.5 + torch.rand(1, outputs, device=device)
    match kind:
        case "int4-g128":
            factors = with_minima(inputs // 128)
            return PackedWeight(codes(inputs // 2, 64), factors, inputs, 4, 128, 0, kind, half=64, row_scale=row_scale)
        case "Q4_0":
            return PackedWeight(codes(inputs // 2, 16), scales(inputs // 32), inputs, 4, 32, 8, kind, half=16)
        case "Q4_K":
            factors = with_minima(inputs // 32)
            return PackedWeight(codes(inputs // 2, 32), factors, inputs, 4, 32, 0, kind, half=32, row_scale=row_scale)
        case "Q6_K":
            high = codes(inputs // 4, 16)
            return PackedWeight(codes(inputs // 2, 16), scales(inputs // 16), inputs, 6, 16, 32, kind, 64, high=high)
        case "Q8_0":
            return PackedWeight(codes(inputs, 32, INT8), scales(inputs // 32), inputs, 8, 32, 0, kind)
        case "MXFP4":
            factors = scales(inputs // 32)
            return PackedWeight(codes(inputs // 2, 16), factors, inputs, 4, 32, 0, kind, half=16, float4=True)
        case "int8":
            return PackedWeight(codes(inputs, 64, INT8), scales(1), inputs, 8, inputs, 0, kind)
    raise ValueError(f"no packed form named {kind!r}")


def _experts() -> list[Workload]:
    def experts(tokens: int, dtype: torch.dtype) -> Callable[[torch.device], Call]:
        def prepare(device: torch.device) -> Call:
            count, dim, inner, top_k = 128, 2048, 768, 8
            scaled = dtype in (INT8, FP8)
            gate_up, down = (
                ExpertWeight(
                    _randn(device, count, rows, columns, dtype=dtype),
                    torch.rand(count, rows, device=device) / 100 if scaled else None,
                )
                for rows, columns in ((2 * inner, dim), (dim, inner))
            )
            x, logits = _randn(device, tokens, dim), torch.randn(tokens, count, device=device)
            weights, ids = ops.route_experts(logits, top_k)
            used = count * (1 - (1 - top_k / count) ** tokens)
            moved = int((gate_up.data.nbytes + down.data.nbytes) * used / count) + 4 * x.nbytes
            flops = 2 * tokens * top_k * 3 * dim * inner
            return Call(lambda: ops.moe_mlp(x, gate_up, down, weights, ids), moved, flops)

        return prepare

    def packed(kind: str, tokens: int) -> Callable[[torch.device], Call]:
        def prepare(device: torch.device) -> Call:
            count, dim, inner, top_k = 32, 2880, 2880, 4  # gpt-oss-20b; widths rounded to whole blocks
            dim = inner = 3072 if kind == "Q4_K" else dim
            gate_up, down = (
                ExpertWeight(random_packed(kind, device, count * rows, columns), count=count)
                for rows, columns in ((2 * inner, dim), (dim, inner))
            )
            x, logits = _randn(device, tokens, dim), torch.randn(tokens, count, device=device)
            weights, ids = ops.route_experts(logits, top_k)
            used = 1 - (1 - top_k / count) ** tokens
            moved = int((gate_up.data.nbytes + down.data.nbytes) * used) + 4 * x.nbytes
            flops = 2 * tokens * top_k * 3 * dim * inner
            return Call(lambda: ops.moe_mlp(x, gate_up, down, weights, ids), moved, flops)

        return prepare

    def router(device: torch.device) -> Call:
        logits = torch.randn(4096, 128, device=device)
        return Call(lambda: ops.route_experts(logits, 8), logits.nbytes)

    def adapters(tokens: int) -> Callable[[torch.device], Call]:
        def prepare(device: torch.device) -> Call:
            count, rank = 16, 16
            lora_a, lora_b = _randn(device, count, rank, HIDDEN), _randn(device, count, HIDDEN, rank)
            x, out = _randn(device, tokens, HIDDEN), _randn(device, tokens, HIDDEN)
            chosen = torch.randint(-1, count, (tokens,), dtype=torch.int32, device=device)
            scales = torch.rand(count, device=device) / 1000
            moved = lora_a.nbytes + lora_b.nbytes + x.nbytes + 2 * out.nbytes
            run = lambda: ops.add_lora(out, x, lora_a, lora_b, chosen, scales)  # noqa: E731
            return Call(run, moved, 4 * tokens * rank * HIDDEN, reset=out.zero_)

        return prepare

    return [
        Workload("router 4096 of 128", router),
        *[Workload(f"experts {tokens} tokens", experts(tokens, BF16)) for tokens in (1, 64, 4096)],
        Workload("experts 64 tokens fp8", experts(64, FP8)),
        Workload("experts 1 token MXFP4", packed("MXFP4", 1)),
        Workload("experts 64 tokens MXFP4", packed("MXFP4", 64)),
        Workload("experts 64 tokens Q4_K", packed("Q4_K", 64)),
        Workload("adapters 64 tokens", adapters(64)),
    ]


def _sampling() -> list[Workload]:
    def draw(rows: int, top_k: int, top_p: float) -> Callable[[torch.device], Call]:
        def prepare(device: torch.device) -> Call:
            logits = 3 * torch.randn(rows, VOCAB, device=device)
            ones = torch.ones(rows, device=device)
            ks, seeds = torch.full((rows,), top_k, dtype=torch.int32, device=device), torch.arange(rows, device=device)
            arguments = (ones, ks, ones * top_p, ones * 0, seeds, seeds)
            peer = ("torch sort", lambda: torch.sort(logits, dim=-1, descending=True))
            return Call(lambda: ops.sample(logits, *arguments), logits.nbytes, peers=(peer,))

        return prepare

    def logprobs(device: torch.device) -> Call:
        logits = torch.randn(64, VOCAB, device=device)
        tokens = torch.arange(64, device=device)
        peer = ("torch log_softmax", lambda: torch.log_softmax(logits, -1))
        return Call(lambda: ops.token_logprobs(logits, tokens), logits.nbytes, peers=(peer,))

    def penalties(device: torch.device) -> Call:
        logits, ones = torch.randn(64, VOCAB, device=device), torch.ones(64, device=device)
        counts = torch.zeros(64, VOCAB, dtype=torch.int32, device=device)
        prompt = torch.zeros(64, -(-VOCAB // 32), dtype=torch.int32, device=device)
        slots = torch.arange(64, device=device)
        run = lambda: ops.apply_penalties(logits, counts, prompt, slots, ones, ones * 0, ones * 0)  # noqa: E731
        return Call(run, 3 * logits.nbytes + prompt.nbytes)

    def bitmask(device: torch.device) -> Call:
        logits = torch.randn(64, VOCAB, device=device)
        mask = torch.full((64, -(-VOCAB // 32)), -1, dtype=torch.int32, device=device)
        return Call(lambda: ops.apply_bitmask(logits, mask), mask.nbytes)

    def verify(device: torch.device) -> Call:
        target = torch.softmax(torch.randn(32, 5, VOCAB, device=device), -1)
        tokens, seeds = torch.zeros(32, 4, dtype=torch.int64, device=device), torch.arange(32, device=device)
        counts = torch.full((32,), 4, dtype=torch.int32, device=device)
        run = lambda: ops.verify_drafts(target, None, tokens, counts, seeds, seeds)  # noqa: E731
        return Call(run, target.nbytes // 5)

    return [
        Workload("sample 1 row", draw(1, 0, 1.0)),
        Workload("sample 64 rows", draw(64, 0, 1.0)),
        Workload("sample 64 rows top-k 50", draw(64, 50, 1.0)),
        Workload("sample 64 rows top-k 50 top-p 0.9", draw(64, 50, 0.9)),
        Workload("token_logprobs 64 rows", logprobs),
        Workload("apply_penalties 64 rows", penalties),
        Workload("apply_bitmask 64 rows", bitmask),
        Workload("verify_drafts 32 x 4", verify),
    ]
