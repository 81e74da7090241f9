"""transformers on PyTorch in bfloat16, weights dequantized from the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from protocol import Peer, Tokens, serve


class Transformers(Peer):
    def load(self, model: str, threads: int) -> dict[str, Any]:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            Path(model).parent, gguf_file=Path(model).name, dtype=torch.bfloat16
        ).eval()
        return {"version": transformers.__version__, "format": "bfloat16"}

    def generate(self, prompts: list[Tokens], new_tokens: list[int]) -> list[Tokens]:
        import torch

        longest, count = max(map(len, prompts)), max(new_tokens)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return [row[longest : longest + n].tolist() for row, n in zip(out, new_tokens, strict=True)]


if __name__ == "__main__":
    serve(Transformers())
