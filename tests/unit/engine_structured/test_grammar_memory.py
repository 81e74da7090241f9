"""Ever new schemas leave neither memory nor files behind."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from fakes.byte_tokenizer import ByteTokenizer
from octavo_engine.sampling_params import StructuredOutput
from octavo_engine.structured.grammar import MAX_CACHED, GrammarCompiler

TOKENIZER = ByteTokenizer()
MOST_MIB = 64


def schema(number: int) -> StructuredOutput:
    fields = {f"field{number}_{i}": {"type": "string", "maxLength": 10 + number % 50} for i in range(1 + number % 8)}
    value = {"type": "object", "properties": fields, "required": sorted(fields), "additionalProperties": False}
    return StructuredOutput(json_schema=json.dumps(value))


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(1_800)
def test_memory_stays_within_64_mib_over_unique_schemas(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    compiler = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, TOKENIZER.eos_token_ids)

    def resident_mib() -> float:
        return float(psutil.Process().memory_info().rss) / (1 << 20)

    for number in range(2 * MAX_CACHED):  # what a full cache takes is not growth
        compiler.compile(schema(number))
    before = resident_mib()
    for number in range(count):
        compiler.compile(schema(1_000_000 + number)).accept(TOKENIZER.encode("{", add_special_tokens=False)[0])
    assert resident_mib() - before <= MOST_MIB
    assert not list(tmp_path.iterdir())
