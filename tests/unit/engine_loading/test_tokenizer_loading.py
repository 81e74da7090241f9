"""Tokenizers from Hugging Face folders and from GGUF metadata, good and hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer

from octavo_engine.errors import InvalidRequestError, ModelLoadError
from octavo_engine.tokenizer.gguf_vocabulary import tokenizer_from_metadata
from octavo_engine.tokenizer.load import load_tokenizer
from octavo_engine.tokenizer.pieces import byte_alphabet
from octavo_engine.tokenizer.pre_tokenizers import _PATTERNS, pre_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "in 1999 there were 12345 foxes\n\n  and dogs",
    "été 日本",
]


def _trained_bpe() -> RustTokenizer:
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(byte_alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<s>", "</s>", "<|eot|>"])
    return tokenizer


def _write(folder: Path, tokenizer: RustTokenizer, **files: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


# ---------------------------------------------------------------- Hugging Face folders


def test_a_folder_gives_the_ids_of_its_tokenizer_json(tmp_path: Path) -> None:
    rust = _trained_bpe()
    tokenizer = load_tokenizer(_write(tmp_path, rust))
    for text in CORPUS:
        assert tokenizer.encode(text) == rust.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_ends_a_generation_comes_from_generation_config_and_tokenizer(tmp_path: Path) -> None:
    rust = _trained_bpe()
    eot, end = rust.token_to_id("<|eot|>"), rust.token_to_id("</s>")
    folder = _write(
        tmp_path,
        rust,
        config={"eos_token_id": 1},
        generation_config={"eos_token_id": [eot]},
        tokenizer_config={"eos_token": {"content": "</s>"}, "bos_token": "<s>"},
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_ids == {eot, end}
    assert tokenizer.bos_token_id == rust.token_to_id("<s>")


def test_config_json_names_the_end_where_generation_config_does_not(tmp_path: Path) -> None:
    folder = _write(tmp_path, _trained_bpe(), config={"eos_token_id": 7}, generation_config={})
    assert load_tokenizer(folder).eos_token_ids == {7}


@pytest.mark.parametrize("saved_with_bos", [False, True])
@pytest.mark.parametrize("wanted", [False, True, None])
def test_add_bos_token_decides_where_it_is_given(tmp_path: Path, saved_with_bos: bool, wanted: bool | None) -> None:
    rust = _trained_bpe()
    bos = rust.token_to_id("<s>")
    if saved_with_bos:
        rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    config = {"bos_token": "<s>"} | ({} if wanted is None else {"add_bos_token": wanted})
    tokenizer = load_tokenizer(_write(tmp_path, rust, tokenizer_config=config))
    expected = saved_with_bos if wanted is None else wanted
    assert (tokenizer.encode("fox")[0] == bos) == expected
    assert tokenizer.encode("fox", add_special_tokens=False)[0] != bos


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path: Path) -> None:
    rust = _trained_bpe()
    rust.enable_truncation(2)
    rust.enable_padding(length=9)
    text = "the quick brown fox"
    assert load_tokenizer(_write(tmp_path, rust)).decode(load_tokenizer(tmp_path).encode(text)) == text


def test_tokens_called_special_only_in_the_config_are_special(tmp_path: Path) -> None:
    rust = _trained_bpe()
    rust.add_tokens([AddedToken("<tool>", special=False)])
    config = {"additional_special_tokens": ["<tool>"]}
    tokenizer = load_tokenizer(_write(tmp_path, rust, tokenizer_config=config))
    assert rust.token_to_id("<tool>") in tokenizer.special_token_ids


def test_the_template_file_wins_over_the_config(tmp_path: Path) -> None:
    folder = _write(tmp_path, _trained_bpe(), tokenizer_config={"chat_template": "old"})
    assert load_tokenizer(folder).chat_template == "old"
    (folder / "chat_template.jinja").write_text("new")
    assert load_tokenizer(folder).chat_template == "new"


def test_named_templates_are_read(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    tokenizer = load_tokenizer(_write(tmp_path, _trained_bpe(), tokenizer_config={"chat_template": named}))
    assert tokenizer.apply_chat_template([]) == "d"
    assert tokenizer.apply_chat_template([], tools=[{}]) == "t"


def test_special_tokens_reach_the_template(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "chat_template": "{{ bos_token }}|{{ extra }}"}
    tokenizer = load_tokenizer(_write(tmp_path, _trained_bpe(), tokenizer_config=config))
    assert tokenizer.apply_chat_template([], template_kwargs={"extra": 1}) == "<s>|1"


def test_wordpiece_pieces_join_as_words(tmp_path: Path) -> None:
    vocab = {"[UNK]": 0, "play": 1, "##ing": 2, "fox": 3}
    rust = RustTokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = load_tokenizer(_write(tmp_path, rust))
    ids = tokenizer.encode("playing fox")
    assert ids == [1, 2, 3]
    assert tokenizer.decode(ids) == rust.decode(ids) == "playing fox"


def test_half_a_surrogate_pair_is_the_caller_s_error(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_write(tmp_path, _trained_bpe()))
    with pytest.raises(InvalidRequestError, match="surrogate"):
        tokenizer.encode("a\ud800b")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        "null",
        '{"model": {"type": "Evil"}}',
        '{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[["a","b"]]}}',
        '{"version":"1.0","model":{"type":"BPE","vocab":{"a":-1},"merges":[]}}',
        '{"version":"1.0","model":{"type":"BPE","vocab":{"a":99999999999999999999},"merges":[]}}',
        '{"version":"1.0","pre_tokenizer":{"type":"Split","pattern":{"Regex":"("},"behavior":"Isolated","invert":false},'
        '"model":{"type":"BPE","vocab":{"a":0},"merges":[]}}',
        "[" * 100_000,
        '{"a":' * 100_000,
    ],
    ids=range(12),
)
def test_a_broken_tokenizer_json_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: not a usable tokenizer"):
        load_tokenizer(tmp_path)


def test_bytes_that_are_no_text_are_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, '"x"'])
def test_a_broken_config_names_its_file(tmp_path: Path, content: str) -> None:
    folder = _write(tmp_path, _trained_bpe())
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": 5, "bos_token": [], "add_bos_token": "yes", "chat_template": 7},
        {"additional_special_tokens": [1, None, {}], "eos_token": {"content": 5}},
        {"bos_token": "<not in the vocabulary>", "add_bos_token": True},
    ],
)
def test_fields_of_the_wrong_kind_are_ignored_or_harmless(tmp_path: Path, config: dict) -> None:
    tokenizer = load_tokenizer(_write(tmp_path, _trained_bpe(), tokenizer_config=config))
    assert tokenizer.decode(tokenizer.encode("fox")) == "fox"


def test_python_in_a_model_folder_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').write('ran')"
    for name in ("tokenization_evil.py", "__init__.py", "sitecustomize.py"):
        (tmp_path / name).write_text(code)
    config = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}, "tokenizer_class": "Evil"}
    load_tokenizer(_write(tmp_path, _trained_bpe(), tokenizer_config=config)).encode("fox")
    assert not canary.exists()


def test_a_folder_without_a_fast_tokenizer_says_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json \(tokenizer\.model alone"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------- GGUF metadata


def _gguf_bpe(**changes: Any) -> dict[str, Any]:
    rust = json.loads(_trained_bpe().to_str())
    vocab = rust["model"]["vocab"]
    tokens = [*sorted(vocab, key=vocab.__getitem__), "<s>", "</s>", "<|eot_id|>", "<think>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(vocab) + [3, 3, 3, 4],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in rust["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": len(vocab),
        "tokenizer.ggml.eos_token_id": len(vocab) + 1,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def _load(metadata: dict[str, Any]):
    return tokenizer_from_metadata(metadata, Path("m.gguf"))


def test_byte_level_metadata_gives_the_ids_it_was_made_from() -> None:
    rust, tokenizer = _trained_bpe(), _load(_gguf_bpe())
    for text in CORPUS:
        assert tokenizer.encode(text) == rust.encode(text).ids


def test_control_tokens_are_special_and_user_defined_ones_are_text() -> None:
    tokenizer = _load(_gguf_bpe())
    size = tokenizer.vocab_size
    assert tokenizer.encode("<think>fox<|eot_id|>")[0] == size - 1
    assert tokenizer.eos_token_ids == {size - 3, size - 2}
    assert size - 1 not in tokenizer.special_token_ids
    assert tokenizer.decode(tokenizer.encode("<think>fox<|eot_id|>")) == "<think>fox"


def test_bos_is_added_as_the_flag_says() -> None:
    with_bos = _load(_gguf_bpe(add_bos_token=True))
    assert with_bos.encode("fox")[0] == with_bos.bos_token_id
    assert _load(_gguf_bpe(add_bos_token=False)).encode("fox")[0] != with_bos.bos_token_id
    both = _load(_gguf_bpe(add_bos_token=True, add_eos_token=True)).encode("fox")
    assert (both[0], both[-1]) == (with_bos.bos_token_id, with_bos.bos_token_id + 1)


def _sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    words = ["▁the", "▁t", "th", "he", "▁", "t", "h", "e", "▁fox", "▁f", "ox", "fo", "f", "o", "x", "<|user|>"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(words) - 1), 4]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(index) for index in range(len(words))],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_sentencepiece_metadata_merges_best_scores_first_and_falls_back_to_bytes() -> None:
    tokenizer = _load(_sentencepiece_metadata())
    ids = tokenizer.encode("the fox é")
    tokens = [tokenizer._tokenizer.id_to_token(token) for token in ids]
    assert tokens == ["<s>", "▁the", "▁fox", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == "the fox é"


def test_a_sentencepiece_model_without_prefix_space_keeps_text_as_it_is() -> None:
    tokenizer = _load(_sentencepiece_metadata(add_space_prefix=False, add_bos_token=False))
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"
    assert tokenizer.decode(tokenizer.encode("the")) == "the"


def test_sentencepiece_equals_transformers_on_the_same_vocabulary() -> None:
    from transformers.models.llama.tokenization_llama import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    metadata = _sentencepiece_metadata()
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    backend = LlamaTokenizer(vocab=vocab, merges=merges).backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = _load(metadata)
    for text in ["the fox", "the  the", "fofox thex é", "x", "tthhee foxfox"]:
        assert tokenizer.encode(text, add_special_tokens=False) == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "rwkv"}, "'rwkv' is not supported; supported: gpt2, llama"),
        ({"model": 5}, "must be str"),
        ({"tokens": []}, "carries no tokenizer"),
        ({"tokens": ["a", "a"]}, "same token twice"),
        ({"tokens": [1, 2]}, "must be a list of str"),
        ({"merges": ["nospace"]}, "which is no pair"),
        ({"merges": ["zz yy"]}, "not a usable tokenizer"),
        ({"token_type": [1]}, "has 1 entries"),
        ({"eos_token_id": 10**6}, "beyond the"),
        ({"bos_token_id": "x"}, "must be int"),
        ({"pre": "made-up"}, "'made-up' is not known"),
        ({"add_bos_token": 1}, "must be bool"),
    ],
)
def test_wrong_metadata_names_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        _load(_gguf_bpe(**changes))


def test_a_file_that_names_no_pre_tokenizer_is_read_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    metadata = _gguf_bpe()
    del metadata["tokenizer.ggml.pre"]
    tokenizer = _load(metadata)
    assert "names no pre-tokenizer" in caplog.text
    assert tokenizer.decode(tokenizer.encode(CORPUS[1])) == CORPUS[1]


def test_sentencepiece_without_scores_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="scores is missing"):
        _load(_sentencepiece_metadata(scores=[]))


def test_templates_of_the_metadata_are_read() -> None:
    metadata = _gguf_bpe() | {"tokenizer.chat_template": "d", "tokenizer.chat_template.tool_use": "t"}
    assert _load(metadata).apply_chat_template([]) == "d"
    assert _load(metadata).apply_chat_template([], tools=[{}]) == "t"


WORDS = [
    ("llama-bpe", "Hello 12345 WE'RE\n\n x", ["Hello", "Ġ", "123", "45", "ĠWE", "'RE", "ĊĊ", "Ġx"]),
    ("qwen2", "a 123 b", ["a", "Ġ", "1", "2", "3", "Ġb"]),
    ("smollm", "a 12", ["a", "Ġ", "1", "2"]),
    ("gpt-2", "a 12  b", ["a", "Ġ12", "Ġ", "Ġb"]),
    ("tekken", "helloWorld 12", ["hello", "World", "Ġ", "1", "2"]),
    ("gpt-4o", "don't 1234", ["don't", "Ġ", "123", "4"]),
    ("deepseek-v3", "ab 1234", ["ab", "Ġ", "123", "4"]),
]


@pytest.mark.parametrize(("name", "text", "words"), WORDS)
def test_text_is_cut_into_words_as_the_model_was_trained(name: str, text: str, words: list[str]) -> None:
    assert [word for word, _ in pre_tokenizer(name).pre_tokenize_str(text)] == words


@pytest.mark.parametrize("name", sorted(_PATTERNS))
def test_no_pre_tokenizer_loses_text(name: str) -> None:
    alphabet = byte_alphabet()
    for text in CORPUS:
        pieces = [piece for piece, _ in pre_tokenizer(name).pre_tokenize_str(text)]
        assert bytes(alphabet[char] for piece in pieces for char in piece).decode() == text
