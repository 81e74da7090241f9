"""vLLM's CPU build in one process. Reads a folder of safetensors, see --vllm-model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from protocol import Peer, Tokens, serve

MAX_MODEL_LEN = 2048


class VLLM(Peer):
    def load(self, model: str, threads: int) -> dict[str, Any]:
        processors = sorted(os.sched_getaffinity(0))[:threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, processors))
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB, as OpenVINO's
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process is the one that is measured
        import vllm

        self._vllm = vllm
        self._llm = vllm.LLM(
            model, dtype="bfloat16", max_model_len=MAX_MODEL_LEN, max_num_seqs=64, enable_prefix_caching=True
        )
        return {"version": vllm.__version__, "format": Path(model).name}

    def generate(self, prompts: list[Tokens], new_tokens: list[int]) -> list[Tokens]:
        settings = [
            self._vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
            for count in new_tokens
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(answer.outputs[0].token_ids) for answer in self._llm.generate(inputs, settings, use_tqdm=False)]


if __name__ == "__main__":
    serve(VLLM())
