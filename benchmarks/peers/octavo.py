"""Octavo, through its Python object."""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from typing import Any

from protocol import Peer, Tokens, serve


class Octavo(Peer):
    def load(self, model: str, threads: int) -> dict[str, Any]:
        from octavo_engine.llm import LLM

        self._threads = threads
        kv_cache_dtype = os.environ.get("OCTAVO_BENCH_KV_CACHE_DTYPE", "auto")
        self._llm = LLM(
            model,
            num_threads=threads,
            dtype=os.environ.get("OCTAVO_BENCH_DTYPE", "auto"),
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=2048,
            num_kv_blocks=1024,  # of 16 tokens: as many tokens as llama.cpp's context
            max_num_seqs=64,
        )
        info = self._llm.model
        cache = "" if kv_cache_dtype == "auto" else f", {kv_cache_dtype} cache"
        return {"version": version("octavo"), "format": f"{info.quantization} {info.dtype}{cache}, {info.backend}"}

    def generate(self, prompts: list[Tokens], new_tokens: list[int]) -> list[Tokens]:
        from octavo_engine.sampling_params import SamplingParams

        params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in new_tokens]
        return [result.outputs[0].token_ids for result in self._llm.generate(prompts, params)]

    def encode(self, text: str) -> Tokens:
        return self._llm.tokenizer.encode(text)

    def bandwidth(self) -> float:
        import torch

        clock = time.process_time if self._threads == 1 else time.perf_counter
        torch.set_num_threads(self._threads)
        data = torch.ones(1 << 27, dtype=torch.float32)
        best = 0.0
        for _ in range(5):
            started = clock()
            data.sum()
            best = max(best, data.nbytes / (clock() - started))
        return best


if __name__ == "__main__":
    serve(Octavo())
