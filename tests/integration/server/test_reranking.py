"""Cross-encoders and classifiers over HTTP: a real engine process, real texts, transformers as reference."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import BertProcessing

from fakes.running_server import RunningServer, running_server
from models.tiny_checkpoints import SIZES, write_checkpoint
from octavo_engine.config import EngineConfig
from octavo_engine.process import EngineProcessClient
from octavo_engine.tokenizer.load import load_tokenizer
from octavo_server.judging import DEFAULT_INSTRUCTION

QUERY = "which animals purr"
DOCUMENTS = ["cats purr", "dogs bark at night and some animals sleep", "stones do nothing", "which"]
WORDS = sorted({word for text in [QUERY, *DOCUMENTS] for word in text.split()})
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}


def _write_bert_tokenizer(folder: Path) -> None:
    vocab = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    tokenizer.save(str(folder / "tokenizer.json"))


async def _serve(path: Path, **settings: Any) -> AsyncIterator[RunningServer]:
    config = EngineConfig(model=str(path), device="cpu", dtype="float32", num_threads=1, **settings)
    async with running_server(EngineProcessClient(config), load_tokenizer=load_tokenizer) as server:
        yield server


def _reference(model: torch.nn.Module, folder: Path) -> Callable[..., torch.Tensor]:
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))

    def logits(*texts: str, **cut: Any) -> torch.Tensor:
        encoded = tokenizer(*texts, return_tensors="pt", return_token_type_ids=True, **cut)
        with torch.inference_mode():
            return model(**encoded).logits[0]

    return logits


async def test_a_cross_encoder_ranks_as_in_transformers(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, hf.BertForSequenceClassification, hf.BertConfig(**BERT, num_labels=1))
    _write_bert_tokenizer(tmp_path)
    logits = _reference(model, tmp_path)
    expected = [float(logits(QUERY, text).sigmoid()) for text in DOCUMENTS]

    async for server in _serve(tmp_path):
        _, scored, _ = await server.post("/score", {"text_1": QUERY, "text_2": DOCUMENTS})
        assert [item["score"] for item in scored["data"]] == pytest.approx(expected, rel=1e-4)

        _, ranked, _ = await server.post("/rerank", {"query": QUERY, "documents": DOCUMENTS, "top_n": 3})
        best = sorted(range(4), key=lambda i: -expected[i])[:3]
        assert [item["index"] for item in ranked["results"]] == best
        assert ranked["usage"]["prompt_tokens"] == sum(3 + len(f"{QUERY} {text}".split()) for text in DOCUMENTS)

        long = "animals " * 40
        status, refused, _ = await server.post("/rerank", {"query": QUERY, "documents": ["cats", long]})
        assert status == 400
        assert refused["error"]["param"] == "documents[1]"
        cut = {"query": QUERY, "documents": [long], "truncate_prompt_tokens": -1}
        _, fitted, _ = await server.post("/rerank", cut)
        value = float(logits(QUERY, long, truncation="only_second", max_length=24).sigmoid())
        assert fitted["results"][0]["relevance_score"] == pytest.approx(value, rel=1e-4)

        status, refused, _ = await server.post("/v1/embeddings", {"input": "cats"})
        assert status == 400
        assert "needs a model for 'embed'" in refused["error"]["message"]
        status, refused, _ = await server.post("/score", {"queries": "a", "documents": "b", "instruction": "x"})
        assert (status, refused["error"]["param"]) == (400, "instruction")


async def test_a_classifier_names_its_labels(tmp_path: Path) -> None:
    names = {0: "calm", 1: "angry", 2: "other"}
    config = hf.BertConfig(**BERT, id2label=names, label2id={name: i for i, name in names.items()})
    model = write_checkpoint(tmp_path, hf.BertForSequenceClassification, config)
    _write_bert_tokenizer(tmp_path)
    logits = _reference(model, tmp_path)

    async for server in _serve(tmp_path):
        _, found, _ = await server.post("/classify", {"input": DOCUMENTS})
        for item, text in zip(found["data"], DOCUMENTS, strict=True):
            probs = logits(text).softmax(-1)
            assert item["probs"] == pytest.approx(probs.tolist(), rel=1e-4)
            assert item["label"] == names[int(probs.argmax())]
            assert item["num_classes"] == 3
        status, refused, _ = await server.post("/score", {"queries": "a", "documents": "b"})
        assert status == 400
        assert "tells 3 labels apart" in refused["error"]["message"]


async def test_a_language_model_judges_documents(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, hf.Qwen3ForCausalLM, hf.Qwen3Config(**{**SIZES, "max_position_embeddings": 128}))
    vocab = {word: index for index, word in enumerate(["<unk>", "yes", "no", "<Query>:", "<Document>:", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    def judged(document: str, instruction: str) -> float:
        text = (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            f"<Instruct>: {instruction}\n<Query>: {QUERY}\n<Document>: {document}"
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
        # the parts are encoded one by one, so that a document cannot melt into the template
        before, rest = text.split("user\n", 1)
        middle, after = rest.split("<|im_end|>", 1)
        parts = (f"{before}user\n", middle, f"<|im_end|>{after}")
        ids = [token for part in parts for token in tokenizer.encode(part).ids]
        with torch.inference_mode():
            row = model(torch.tensor([ids])).logits[0, -1]
        return float(row[[vocab["no"], vocab["yes"]]].softmax(-1)[1])

    async for server in _serve(tmp_path, task="classify"):
        _, found, _ = await server.post("/score", {"queries": QUERY, "documents": DOCUMENTS})
        expected = [judged(text, DEFAULT_INSTRUCTION) for text in DOCUMENTS]
        assert [item["score"] for item in found["data"]] == pytest.approx(expected, rel=1e-4)
        own = {"query": QUERY, "documents": DOCUMENTS[:1], "instruction": "find stones"}
        _, found, _ = await server.post("/rerank", own)
        assert found["results"][0]["relevance_score"] == pytest.approx(judged(DOCUMENTS[0], "find stones"), rel=1e-4)
