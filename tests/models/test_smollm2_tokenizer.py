"""The tokenizer built from a real GGUF file is the model's own."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from octavo_engine.detokenizer import IncrementalDetokenizer
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.tokenizer.load import load_tokenizer

TEXTS = [
    "Hello world",
    "",
    " ",
    "  two  spaces  and trailing   ",
    "\n\n\t\ttabs\r\nand\r lines\n",
    "I'll don't WE'RE they've i'm she'd 's 'S",
    "Numbers 0 12 345 6789 1,234.56 0x1F ½ ² ١٢٣ १२ 五",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # comment\n\n\nclass A:\n\tpass\n",
    "naïve café e\u0301 Å ﬁ ß İ ǅ",
    "日本語の文章。한국어 中文，标点！",
    "नमस्ते दुनिया ยินดีต้อนรับ مرحبا بالعالم שלום",
    "emoji 🙂👍🏽👩‍👩‍👧‍👦🇫🇷 ☕️",
    "\u00a0non\u2003breaking\u200bzero\ufeff",
    "a" * 2_000,
    "!?.,;:—–…“”‘’«»\\|/`~@#$%^&*()_+-=[]{}<>",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start|x <|im_end> | <repo_name>file_sep<file_sep>",
    "control \x00\x01\x1f\x7f\x85",
]


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path):
    return load_tokenizer(smollm2_gguf)


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> Any:
    """transformers' reading of the same file, with the pre-tokenizer of the model's published `tokenizer.json`.

    transformers leaves out that this family cuts digits apart; the published file has Digits before ByteLevel.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name)
    loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return loaded


def _random_texts(count: int) -> list[str]:
    rng = random.Random(7)
    ranges = [(32, 127), (32, 127), (0xA0, 0x530), (0x4E00, 0x4F00), (0x1F600, 0x1F650), (9, 14), (48, 58), (32, 33)]
    return ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 80))) for _ in range(count)]


def test_ids_equal_the_reference(tokenizer, reference) -> None:
    for text in [*TEXTS, *_random_texts(500)]:
        assert tokenizer.encode(text) == reference.encode(text), text


def test_text_survives_the_round_trip(tokenizer) -> None:
    for text in [*TEXTS, *_random_texts(500)]:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_decoding_any_ids_equals_the_reference(tokenizer, reference) -> None:
    rng = random.Random(3)
    for _ in range(500):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 40))]
        for skip in (False, True):
            expected = reference.backend_tokenizer.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


def test_streaming_any_ids_gives_the_same_text(tokenizer) -> None:
    rng = random.Random(4)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 40))]
        detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(max_tokens=100, ignore_eos=True))
        text = "".join(detokenizer.push([token], token is ids[-1]).text for token in ids[:-1])
        text += detokenizer.push(ids[-1:], True).text
        assert text == tokenizer.decode(ids)


def test_special_tokens_have_their_roles(tokenizer) -> None:
    assert tokenizer.vocab_size == 49_152
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == {0, 2}
    assert tokenizer.special_token_ids == set(range(17))
    assert tokenizer.encode("a", add_special_tokens=True) == tokenizer.encode("a", add_special_tokens=False)


def test_a_chat_is_rendered_as_by_transformers(tokenizer, reference) -> None:
    chat = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Spain?"},
    ]
    for messages in (chat[:1], chat, [{"role": "system", "content": "Be brief."}, *chat]):
        expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.apply_chat_template(messages) == expected


def test_tokens_are_shown_as_text_or_bytes(tokenizer) -> None:
    first, *_ = tokenizer.encode("鷲")
    assert tokenizer.token_bytes(first) == "鷲".encode()[: len(tokenizer.token_bytes(first))]
    assert tokenizer.token_text(first).startswith("bytes:\\x")
    assert tokenizer.token_text(tokenizer.encode(" the")[0]) == " the"
    assert tokenizer.token_text(2) == "<|im_end|>"


def test_threads_share_the_tokenizer(tokenizer) -> None:
    expected = {text: tokenizer.encode(text) for text in TEXTS}
    wrong: list[str] = []

    def work() -> None:
        for text, ids in expected.items():
            if tokenizer.encode(text) != ids or tokenizer.decode(ids, skip_special_tokens=False) != text:
                wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
