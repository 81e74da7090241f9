"""Decoded tokens per second of transformers on a checkpoint, in a process of its own that a caller can end.

    python benchmarks/peers/transformers_batching.py FOLDER [--method continuous|generate] [--device cuda] [--batch 64]
                                                     [--context 1024] [--new-tokens 65]

Greedy, end of sequence ignored, all sequences equally long. Prefill and start do not count: the rate is that of the
tokens after every sequence has its first one, by timestamps for continuous batching and by two runs for `generate`.
Continuous batching is given a cache and a step of just the size this needs: left to itself it takes the whole memory,
and without a flash-attention package each step then builds a mask over all of it (72 s a step with a model of two
layers on a CPU, under a second with the sizes given). Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

PAGE = 256
MAX_STEP_TOKENS = 2_048  # the mask is as large as a step's tokens times the whole cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--method", choices=["continuous", "generate"], default="continuous")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=65)
    arguments = parser.parse_args()
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.folder,
        dtype=torch.bfloat16 if arguments.device == "cuda" else torch.float32,
        device_map=arguments.device,
        attn_implementation="sdpa",
    ).eval()
    generator = torch.Generator().manual_seed(arguments.batch)
    shape = (arguments.batch, arguments.context)
    prompts = torch.randint(10, model.config.vocab_size - 1, shape, generator=generator)
    rate = (continuous if arguments.method == "continuous" else generate)(model, prompts, arguments.new_tokens)
    print(json.dumps({"method": arguments.method, "version": transformers.__version__, "tokens_per_s": rate}))


def continuous(model: Any, prompts: Any, new_tokens: int) -> float:
    """Rate between the last sequence's first token and the first sequence's last, in the second of two runs."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    batch, context = prompts.shape
    pages = math.ceil((context + new_tokens) / PAGE) + 1
    settings = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=batch * pages,
        max_batch_tokens=max(batch, min(MAX_STEP_TOKENS, batch * context)),
        max_requests_per_batch=batch,
        allow_block_sharing=False,
    )
    outputs: dict[str, Any] = {}
    for new in (2, new_tokens):
        outputs = model.generate_batch(
            inputs=prompts.tolist(),
            generation_config=GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1),
            continuous_batching_config=settings,
            record_timestamps=True,
        )
        if len(outputs) != batch or any(len(output.generated_tokens) != new for output in outputs.values()):
            raise RuntimeError(f"continuous batching gave {len(outputs)} of {batch} sequences, or not all their tokens")
    times = [output.timestamps for output in outputs.values()]
    start, end = max(stamps[0] for stamps in times), min(stamps[-1] for stamps in times)
    counted = sum(start < stamp <= end for stamps in times for stamp in stamps)
    if counted < batch:
        raise RuntimeError("sequences did not decode together: raise --new-tokens")
    return counted / (end - start)


def generate(model: Any, prompts: Any, new_tokens: int) -> float:
    """Rate of a static batch."""
    import torch

    prompts = prompts.to(model.device)
    seconds = {}
    for new in (2, 2, new_tokens):
        _wait()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        _wait()
        seconds[new] = time.perf_counter() - start
    return float(prompts.shape[0] * (new_tokens - 2) / (seconds[new_tokens] - seconds[2]))


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
