"""llama.cpp through llama-cpp-python's low-level interface, so that several sequences share a batch."""

from __future__ import annotations

import ctypes
from typing import Any

from protocol import Peer, Tokens, serve

BATCH = 2048
CONTEXT = 16_384


class LlamaCpp(Peer):
    def load(self, model: str, threads: int) -> dict[str, Any]:
        import llama_cpp

        self._lib = llama_cpp
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = CONTEXT, BATCH, 512, 64
        params.n_threads = params.n_threads_batch = threads
        if hasattr(params, "kv_unified"):
            params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot create a context")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        return {"version": llama_cpp.__version__, "format": "the file's"}

    def generate(self, prompts: list[Tokens], new_tokens: list[int]) -> list[Tokens]:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        outputs: list[Tokens] = [[] for _ in prompts]
        pending = [(seq, i, token) for seq, prompt in enumerate(prompts) for i, token in enumerate(prompt)]
        while pending:
            piece, pending = pending[:BATCH], pending[BATCH:]
            wanted = [i == len(prompts[seq]) - 1 for seq, i, _ in piece]
            for (seq, _, _), token in self._decode(piece, wanted):
                outputs[seq].append(token)
        while True:
            step = [
                (seq, len(prompts[seq]) + len(out) - 1, out[-1])
                for seq, out in enumerate(outputs)
                if len(out) < new_tokens[seq]
            ]
            if not step:
                return outputs
            for (seq, _, _), token in self._decode(step, [True] * len(step)):
                outputs[seq].append(token)

    def _decode(
        self, entries: list[tuple[int, int, int]], wanted: list[bool]
    ) -> list[tuple[tuple[int, int, int], int]]:
        """Run (sequence, position, token) entries; the best next token of those wanted."""
        import numpy as np

        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (seq, position, token) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = seq, int(wanted[i])
        code = self._lib.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode failed with {code}")
        best = []
        for i, entry in enumerate(entries):
            if wanted[i]:
                row = self._lib.llama_get_logits_ith(self._context, i)
                address = ctypes.cast(row, ctypes.POINTER(ctypes.c_float))
                best.append((entry, int(np.ctypeslib.as_array(address, (self._vocab_size,)).argmax())))
        return best


if __name__ == "__main__":
    serve(LlamaCpp())
