"""Whole decode and prefill steps of real architectures with random weights on one GPU, against the roofline.

    python benchmarks/gpu_engine.py [--models llama-3-8b qwen3-30b-a3b ...] [--batches 1 64 256] [--context 1024]
                                    [--peer] [--output FILE]

For each model and batch: the decode step through the runner with CUDA graphs, as tokens per second and as a share of
the least time its weights and keys need at the copy bandwidth measured in this run; the same through the whole engine,
scheduling and greedy sampling included, with steps one after the other and launched ahead; and a prefill of 8,192
tokens as a share of the measured matrix rate. --peer adds transformers on the same checkpoint beside the engine, by the
quicker of its continuous batching and a static batch (see peers/transformers_batching.py). Every row is written as soon
as it is there. Exits 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch

DTYPE = torch.bfloat16
BLOCK_SIZE = 16
PEER = Path(__file__).parent / "peers" / "transformers_batching.py"
STEPS = 64  # measured
SPARE = 2 * STEPS  # tokens a sequence may grow by
PREFILL = 8_192
ARCHITECTURES = {
    "smollm2-135m": ("Llama", {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                               "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
                               "tie_word_embeddings": True}),
    "qwen3-30b-a3b-12-layers": ("Qwen3Moe", {"hidden_size": 2048, "intermediate_size": 6144,
                                             "moe_intermediate_size": 768, "num_hidden_layers": 12,
                                             "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
                                             "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
                                             "vocab_size": 151936}),
    "llama-3-8b": ("Llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}),
    "qwen3-30b-a3b": ("Qwen3Moe", {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
                                   "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
                                   "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
                                   "norm_topk_prob": True, "vocab_size": 151936}),
}  # fmt: skip
HEADER = "| model | what | batch | context | ms | tokens/s | least ms | share | peer tokens/s | ours / peer |"


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. least_s: what the measured limits of this card allow; peer: tokens per second, 0 if not run."""

    model: str
    what: str
    batch: int
    context: int
    seconds: float
    tokens: int
    least_s: float
    peer: float = 0.0
    peer_name: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "llama-3-8b"], choices=sorted(ARCHITECTURES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--peer", action="store_true", help="also run transformers")
    parser.add_argument("--peer-limit-s", type=int, default=90, help="seconds for each run of transformers")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_engine: PyTorch finds no CUDA device; nothing was measured", file=sys.stderr)
        sys.exit(2)
    from octavo_kernels.triton.timing import measure_limits

    limits = measure_limits()
    title = f"# Engine steps on {torch.cuda.get_device_name()}, {datetime.now(UTC).date().isoformat()}"
    speed = f"copy {limits.copy_bytes_s / 1e12:.2f} TB/s, product {limits.bf16_flops_s / 1e12:.0f} TFLOP/s"
    lines = [title, "", f"torch {torch.__version__}. Measured in this run: {speed}.", "", HEADER, "|" + "---|" * 10]
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(arguments.output.open("w", buffering=1)) if arguments.output else None
        for line in itertools.chain(lines, map(_line, _rows(arguments, limits))):
            print(line, flush=True)
            if output:
                print(line, file=output)


def _rows(arguments: argparse.Namespace, limits) -> Iterator[Row]:
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            _write_checkpoint(Path(folder), model)
            yield from _measure(Path(folder), model, arguments, limits)


def _write_checkpoint(folder: Path, model: str) -> None:
    """Random bf16 weights in the files a download would have, made on the GPU."""
    import transformers

    family, sizes = ARCHITECTURES[model]
    config = getattr(transformers, f"{family}Config")(**sizes, max_position_embeddings=131_072, dtype="bfloat16")
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(DTYPE)
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"eos_token_id": 2}))
    torch.cuda.empty_cache()


def _measure(folder: Path, model: str, arguments: argparse.Namespace, limits) -> Iterator[Row]:
    from octavo_engine.config import EngineConfig
    from octavo_engine.loader.load import load_runner
    from octavo_engine.runner.interface import SequenceSlice

    largest, context = max(arguments.batches), arguments.context
    blocks = max(largest * -(-(context + SPARE) // BLOCK_SIZE), PREFILL // BLOCK_SIZE) + 1
    config = EngineConfig(
        model=str(folder), device="cuda", dtype="bfloat16", num_kv_blocks=blocks, block_size=BLOCK_SIZE,
        max_model_len=max(PREFILL, context + SPARE), max_num_seqs=largest, max_queued_requests=largest,
        max_queued_tokens=2 * largest * (context + SPARE),
    )  # fmt: skip
    runner = load_runner(config, lambda _: None)
    runner.warm_up()
    info = runner.info
    sizes = ARCHITECTURES[model][1]
    for batch in arguments.batches:
        each = -(-(context + SPARE) // BLOCK_SIZE)
        tables = [list(range(i * each, (i + 1) * each)) for i in range(batch)]

        def step(position: int, tables: list[list[int]] = tables) -> None:
            runner.forward([SequenceSlice([5], position, table) for table in tables])

        seconds = _time(lambda i, step=step: step(context + i), STEPS)
        moved = _weight_bytes(info.weight_bytes, sizes, batch) + batch * context * info.kv_bytes_per_token
        least = moved / limits.copy_bytes_s
        yield Row(model, "decode step", batch, context, seconds, batch, least)
        peer, peer_name = _peer(folder, batch, context, arguments.peer_limit_s) if arguments.peer else (0.0, "")
        for mode in ("off", "on"):
            seconds = _engine_step(runner, msgspec.structs.replace(config, async_scheduling=mode), batch, context)
            what = "engine step" if mode == "off" else "engine step, async"
            yield Row(model, what, batch, context, seconds, batch, least, peer, peer_name)
    table = list(range(PREFILL // BLOCK_SIZE))
    seconds = _time(lambda _: runner.forward([SequenceSlice([5] * PREFILL, 0, table)]), 3)
    yield Row(model, "prefill", 1, PREFILL, seconds, PREFILL, _prefill_flops(info, sizes) / limits.bf16_flops_s)


def _time(call, repeats: int) -> float:
    """Median seconds of call(i), host time included, after one warm-up."""
    call(0)
    torch.cuda.synchronize()
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        call(i)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _engine_step(runner, config, batch: int, context: int) -> float:
    """Mean seconds of a step of the whole engine with `batch` sequences decoding.

    Nothing waits for the device but the engine itself. Every step's tokens must have come out.
    """
    from octavo_engine.engine import EngineCore
    from octavo_engine.messages import AddRequest
    from octavo_engine.sampling_params import SamplingParams

    core = EngineCore(runner, config)
    sampling = SamplingParams(max_tokens=SPARE, temperature=0.0, ignore_eos=True)
    for index, prompt in enumerate(_prompts(batch, context)):
        core.add(AddRequest(request_id=f"bench-{index}", prompt_token_ids=prompt, sampling=sampling))
    while core.scheduler.num_waiting or core.stats().generation_tokens < batch:
        core.step()
    for _ in range(2):
        core.step()
    torch.cuda.synchronize()
    before, start = core.stats().generation_tokens, time.perf_counter()
    for _ in range(STEPS):
        core.step()
    seconds = (time.perf_counter() - start) / STEPS
    if core.stats().generation_tokens - before != STEPS * batch:
        raise RuntimeError(f"{STEPS} steps of {batch} sequences made other than {STEPS * batch} tokens")
    core.abort([f"bench-{index}" for index in range(batch)])
    while core.has_work:
        core.step()
    return seconds


def _prompts(batch: int, context: int) -> list[list[int]]:
    """No two share a prefix."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(10, 40_000, (batch, context), generator=generator).tolist()


def _weight_bytes(total: int, sizes: dict[str, int], batch: int) -> int:
    """Bytes of weights a step reads: of a mixture, the share of experts that `batch` tokens choose."""
    if "num_experts" not in sizes:
        return total
    count, top_k = sizes["num_experts"], sizes["num_experts_per_tok"]
    each = 3 * sizes["hidden_size"] * sizes["moe_intermediate_size"] * DTYPE.itemsize * sizes["num_hidden_layers"]
    return int(total - count * each + each * count * (1 - (1 - top_k / count) ** batch))


def _prefill_flops(info, sizes: dict[str, int]) -> int:
    """Two operations for each parameter used and token, and causal attention."""
    used = _weight_bytes(info.weight_bytes, sizes, 1) // DTYPE.itemsize
    head_dim = sizes.get("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    attention = 2 * sizes["num_hidden_layers"] * sizes["num_attention_heads"] * head_dim * PREFILL**2
    return 2 * used * PREFILL + attention


def _peer(folder: Path, batch: int, context: int, limit_s: int) -> tuple[float, str]:
    """Decoded tokens per second of transformers, by the quicker of its continuous batching and a static batch, and
    which it was; (0, "") where neither ended in time, which is printed."""
    found: dict[str, float] = {}
    for method in ("continuous", "generate"):
        command = [
            sys.executable, str(PEER), str(folder), "--method", method, "--device", "cuda",
            "--batch", str(batch), "--context", str(context), "--new-tokens", str(STEPS + 1),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=True)
            found[method] = json.loads(done.stdout.splitlines()[-1])["tokens_per_s"]
        except subprocess.TimeoutExpired:
            print(f"transformers ({method}) with {batch} sequences did not end in {limit_s} s", file=sys.stderr)
        except (subprocess.CalledProcessError, ValueError, LookupError) as error:
            reason = getattr(error, "stderr", "") or str(error)
            print(f"transformers ({method}) with {batch} sequences failed: {reason[-500:]}", file=sys.stderr)
    best = max(found, key=lambda method: found[method], default="")
    return found.get(best, 0.0), best


def _line(row: Row) -> str:
    rate = row.tokens / row.seconds
    peer = f"{row.peer:.0f} ({row.peer_name}) | {rate / row.peer:.2f}" if row.peer else "- | -"
    return (
        f"| {row.model} | {row.what} | {row.batch} | {row.context} | {row.seconds * 1e3:.2f} | {rate:.0f} "
        f"| {row.least_s * 1e3:.2f} | {row.least_s / row.seconds:.0%} | {peer} |"
    )


if __name__ == "__main__":
    main()
