"""Two pipeline stages: tokens per second and how busy each stage is, one step at a time over both and a step in each.

    python benchmarks/pipeline_stages.py [--fixed-ms 40] [--token-ms 1] [--output FILE]

Everything is real (scheduler, messages between ranks, a small model's layers) but the time a stage computes: it sleeps
for `fixed-ms` a step (weights read) and `token-ms` a token, as a device of its own would be busy; long enough that what
else runs on the machine does not matter. The ranks are threads of one process. Answers must be equal.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.loader.load import Phases, load_rank
from octavo_engine.messages import AddRequest
from octavo_engine.parallel.follower import follow
from octavo_engine.parallel.host import Nodes
from octavo_engine.parallel.joining import join, open_store
from octavo_engine.parallel.leader import ParallelRunner
from octavo_engine.sampling_params import SamplingParams

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 2048}  # fmt: skip
WORK = {"decode, 1 sequence": (1, 8, 48), "decode, 8 sequences": (8, 8, 48), "decode, 64 sequences": (64, 8, 32),
        "prefill, 8 x 512 tokens": (8, 512, 2)}  # fmt: skip


@dataclass
class Stage:
    """The first layer of a stage, which takes the time of all of them."""

    layer: Any
    fixed_s: float
    token_s: float
    busy_s: float = field(default=0.0)

    def __call__(self, x: torch.Tensor, *rest: Any) -> Any:
        seconds = self.fixed_s + self.token_s * len(x)
        self.busy_s += seconds
        time.sleep(seconds)
        return self.layer(x, *rest)


class NoProcesses:
    """Ranks that are threads are never lost."""

    lost = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixed-ms", type=float, default=40.0)
    parser.add_argument("--token-ms", type=float, default=1.0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    cost = f"{arguments.fixed_ms} ms and {arguments.token_ms} ms a token in each stage"
    lines = [
        f"# Two pipeline stages, {cost}; {datetime.now(UTC).date().isoformat()}, torch {torch.__version__}",
        "",
        "| work | one step at a time: tokens/s | stages busy | a step in each: tokens/s | stages busy | ratio |",
        "|---|---|---|---|---|---|",
    ]
    torch.set_num_threads(1)
    answers: dict[str, list[Any]] = {}
    cells: dict[str, list[tuple[float, str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
        for mode in ("off", "on"):
            core, stages, follower = _engine(folder, mode, arguments.fixed_ms / 1e3, arguments.token_ms / 1e3)
            for name, work in WORK.items():
                rate, busy, answer = _measure(core, stages, *work)
                cells.setdefault(name, []).append((rate, busy))
                answers.setdefault(name, []).append(answer)
            del core
            gc.collect()
            follower.join()  # it ends when the first rank is gone
    for name, ((off, off_busy), (on, on_busy)) in cells.items():
        if answers[name][0] != answers[name][1]:
            raise RuntimeError(f"{name}: the answers differ")
        lines.append(f"| {name} | {off:.0f} | {off_busy} | {on:.0f} | {on_busy} | {on / off:.2f} |")
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


def _engine(folder: str, mode: str, fixed_s: float, token_s: float) -> tuple[EngineCore, list[Stage], threading.Thread]:
    """An engine, the stages of its ranks, and the thread that is the second one."""
    config = EngineConfig(
        model=folder, device="cpu", dtype="float32", pipeline_parallel_size=2, num_threads=1, num_kv_blocks=1_024,
        max_num_seqs=64, max_num_batched_tokens=512, enable_prefix_caching=False, itl_target_s=10.0,
        async_scheduling=mode,
    )  # fmt: skip
    store = open_store(config, Nodes(), f"{folder}/{mode}", 0)

    def rank(index: int) -> tuple[Any, Any]:
        host = join(config, Nodes(), store, index, 2)
        return load_rank(config, Path(folder), Phases(lambda _: None), host), host

    with ThreadPoolExecutor(2) as both:
        (first, host), (second, second_host) = both.map(rank, range(2))
    stages = []
    for runner in (first, second):
        stages.append(Stage(runner.model.layers[0], fixed_s, token_s))
        runner.model.layers = (stages[-1], *runner.model.layers[1:])
    follower = threading.Thread(target=follow, args=(second, second_host))
    follower.start()
    return EngineCore(ParallelRunner(first, host, NoProcesses(), store), config), stages, follower


def _measure(
    core: EngineCore, stages: list[Stage], batch: int, num_prompt: int, num_tokens: int
) -> tuple[float, str, list[list[int]]]:
    """(tokens per second, share of the time each stage was busy, answers)."""
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(10, 500, (batch, num_prompt), generator=generator).tolist()
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        core.add(AddRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling))
    answers: list[list[int]] = [[] for _ in prompts]
    before, started = [stage.busy_s for stage in stages], time.perf_counter()
    while core.has_work:
        for output in core.step().outputs:
            answers[int(output.request_id)].extend(output.token_ids)
    seconds = time.perf_counter() - started
    busy = " and ".join(f"{(stage.busy_s - b) / seconds:.0%}" for stage, b in zip(stages, before, strict=True))
    counted = num_tokens if num_tokens > 2 else num_prompt
    return batch * counted / seconds, busy, answers


if __name__ == "__main__":
    main()
