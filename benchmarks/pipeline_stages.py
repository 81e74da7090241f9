"""Two pipeline stages on one machine, one thread each: tokens per second with one step at a time over both stages, and
with a step in each.

    python benchmarks/pipeline_stages.py [--batches 1 2 8 32] [--tokens 48] [--repeats 3] [--output FILE]

A Llama of 16 layers with random weights, float32; repetitions alternate, medians are printed. Answers must be equal.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.messages import AddRequest
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.startup import build_engine

SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": 2048, "max_position_embeddings": 1024}  # fmt: skip
MODES = ("off", "on")
PROMPT_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 8, 32])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    lines = [
        f"# Two pipeline stages, one thread each, {datetime.now(UTC).date().isoformat()}, torch {torch.__version__}",
        "",
        "| batch | one step at a time, tokens/s | a step in each stage, tokens/s | ratio |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
        cores = {mode: _load(folder, mode) for mode in MODES}
        for batch in arguments.batches:
            rates: dict[str, list[float]] = {mode: [] for mode in MODES}
            for repeat in range(arguments.repeats + 1):
                answers = {}
                for mode, core in cores.items():
                    started = time.perf_counter()
                    answers[mode] = _generate(core, batch, arguments.tokens, repeat)
                    rates[mode].append(batch * arguments.tokens / (time.perf_counter() - started))
                if answers["on"] != answers["off"]:
                    raise RuntimeError(f"batch {batch}: the answers differ")
            off, on = (statistics.median(rates[mode][1:]) for mode in MODES)  # the first repetition warms up
            lines.append(f"| {batch} | {off:.0f} | {on:.0f} | {on / off:.2f} |")
            print(lines[-1], flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


def _load(folder: str, mode: str) -> EngineCore:
    config = EngineConfig(
        model=folder, device="cpu", dtype="float32", pipeline_parallel_size=2, num_threads=1, num_kv_blocks=512,
        max_num_seqs=64, enable_prefix_caching=False, async_scheduling=mode,
    )  # fmt: skip
    return build_engine(config, lambda _: None)


def _generate(core: EngineCore, batch: int, num_tokens: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(10, 2_000, (batch, PROMPT_TOKENS), generator=generator).tolist()
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        core.add(AddRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling))
    answers: list[list[int]] = [[] for _ in prompts]
    while core.has_work:
        for output in core.step().outputs:
            answers[int(output.request_id)].extend(output.token_ids)
    return answers


if __name__ == "__main__":
    main()
