"""OpenVINO GenAI with its continuous batching pipeline, which reads GGUF files or a folder of its own form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from protocol import Peer, Tokens, serve


class OpenVINO(Peer):
    def load(self, model: str, threads: int) -> dict[str, Any]:
        import openvino_genai

        self._genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 1
        scheduler.max_num_seqs = 64
        scheduler.enable_prefix_caching = True
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        return {
            "version": openvino_genai.__version__,
            "format": Path(model).name if Path(model).is_dir() else "the file's",
        }

    def generate(self, prompts: list[Tokens], new_tokens: list[int]) -> list[Tokens]:
        import numpy as np
        import openvino

        configs = []
        for count in new_tokens:
            config = self._genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = count, True, False
            configs.append(config)
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        return [list(result.m_generation_ids[0]) for result in self._pipeline.generate(inputs, configs)]


if __name__ == "__main__":
    serve(OpenVINO())
