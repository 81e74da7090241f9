"""Calibration text that the model writes itself: as much as is wanted, and of the kind that it will see when it serves.

Source: Williams, Chrysostomou and Aletras, arXiv 2410.17170.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from octavo_engine.llm import LLM
from octavo_engine.sampling_params import SamplingParams

START_TOKENS = 6


def write_windows(
    path: Path,
    device: str,
    beginnings: Sequence[Sequence[int]],
    length: int,
    on_progress: Callable[[float], None],
) -> list[list[int]]:
    """For each beginning a window of `length` ids that goes on from its first few as the model would, the same in each
    run. The model is loaded for it and let go again."""
    prompts = [list(ids[:START_TOKENS]) for ids in beginnings]
    sampling = [
        SamplingParams(max_tokens=length - len(prompt), temperature=1.0, seed=number, ignore_eos=True)
        for number, prompt in enumerate(prompts)
    ]
    blocks = len(prompts) * -(-length // 16)
    done = 0

    def on_output(_: object) -> None:
        nonlocal done
        done += 1
        on_progress(done / len(prompts))

    with LLM(
        str(path), device=device, max_model_len=length, max_num_seqs=len(prompts), block_size=16, num_kv_blocks=blocks
    ) as llm:
        written = llm.generate(prompts, sampling, on_output=on_output)
    return [[*prompt, *output.outputs[0].token_ids] for prompt, output in zip(prompts, written, strict=True)]
