"""Adapters come and go while sequences run, and nobody gets another one's answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from fake_runner import FakeRunner, greedy
from octavo_engine.config import EngineConfig
from octavo_engine.engine import EngineCore
from octavo_engine.errors import ConfigError, InvalidRequestError
from octavo_engine.messages import AddRequest, LoadAdapter, SequenceOutput, UnloadAdapter
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.startup import build_engine

PROMPT = list(range(1, 14))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Adapters x, y and z under one folder."""
    folder = tmp_path / "adapters"
    for name in "xyz":
        (folder / name).mkdir(parents=True)
        (folder / name / "content").write_text(f"weights of {name}")
    return folder


def engine(root: Path, **settings: object) -> EngineCore:
    config = EngineConfig(
        model="fake", enable_lora=True, lora_root=str(root), max_num_seqs=8, max_num_batched_tokens=64,
        **settings,  # type: ignore[arg-type]
    )  # fmt: skip
    return EngineCore(FakeRunner(num_blocks=200), config, lambda: 0.0)


def load(core: EngineCore, name: str, path: str, **options: bool) -> SequenceOutput | None:
    """Load and wait for the answer; None if there is none while nothing else runs."""
    core.load_adapter(LoadAdapter(request_id=f"load-{name}", name=name, path=path, **options))
    return next((output for output in drain(core) if output.request_id == f"load-{name}"), None)


def ask(core: EngineCore, name: str, adapter: str = "", max_tokens: int = 8, prompt: list[int] = PROMPT) -> None:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    core.add(AddRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling, adapter=adapter))


def drain(core: EngineCore) -> list[SequenceOutput]:
    outputs: list[SequenceOutput] = []
    for _ in range(2_000):
        if not core.has_work:
            return outputs
        outputs.extend(core.step().outputs)
    raise AssertionError("the engine did not become idle")


def tokens(outputs: list[SequenceOutput], name: str) -> list[int]:
    return [token for output in outputs if output.request_id == name for token in output.token_ids]


@pytest.mark.parametrize("max_loras", [1, 2, 3])
def test_more_adapters_than_slots_are_all_answered(root: Path, max_loras: int) -> None:
    core = engine(root, max_loras=max_loras)
    for name in "xyz":
        assert load(core, name, name) is not None
    for i in range(9):
        ask(core, f"r{i}", ["x", "y", "z", ""][i % 4], prompt=[i + 1, *PROMPT])
    outputs = drain(core)

    for i in range(9):
        weights = ["weights of x", "weights of y", "weights of z", ""][i % 4]
        assert tokens(outputs, f"r{i}") == greedy([i + 1, *PROMPT], 8, weights)
    assert sum(adapter.is_resident for adapter in core.stats().adapters) == max_loras


def test_equal_prompts_share_the_cache_only_under_the_same_adapter(root: Path) -> None:
    core = engine(root)
    for name in "xy":
        load(core, name, name)
    cached = {}
    for number, adapter in enumerate(["", "x", "y", "x", "", "y"]):
        ask(core, f"r{number}", adapter)
        cached[number] = max(output.num_cached_tokens for output in drain(core))

    assert cached == {0: 0, 1: 0, 2: 0, 3: 12, 4: 12, 5: 12}


def test_unloading_waits_for_what_runs_and_refuses_what_comes(root: Path) -> None:
    core = engine(root)
    load(core, "x", "x")
    ask(core, "running", "x")
    core.step()
    core.unload_adapter(UnloadAdapter(request_id="bye", name="x"))

    assert [output.request_id for output in core.step().outputs] == ["running"]
    assert core.stats().adapters[0].is_leaving
    with pytest.raises(InvalidRequestError, match="not loaded"):
        ask(core, "late", "x")
    with pytest.raises(InvalidRequestError, match="being unloaded already"):
        core.unload_adapter(UnloadAdapter(request_id="again", name="x"))
    outputs = drain(core)
    assert tokens(outputs, "running") == greedy(PROMPT, 8, "weights of x")[2:]
    assert outputs[-1].request_id == "bye"
    assert core.stats().adapters == []
    assert not core.has_work


def test_an_unused_adapter_leaves_at_once(root: Path) -> None:
    core = engine(root)
    load(core, "x", "x")
    core.unload_adapter(UnloadAdapter(request_id="bye", name="x"))
    assert [output.request_id for output in core.step().outputs] == ["bye"]
    assert load(core, "x", "x") is not None


def test_an_adapter_in_use_is_replaced_when_it_falls_idle(root: Path) -> None:
    core = engine(root)
    load(core, "x", "x")
    ask(core, "old", "x")
    core.step()
    core.load_adapter(LoadAdapter(request_id="new", name="x", path="y", replace=True))
    outputs = drain(core)
    assert tokens(outputs, "old") == greedy(PROMPT, 8, "weights of x")[1:]
    assert "new" in [output.request_id for output in outputs]
    ask(core, "fresh", "x")
    assert tokens(drain(core), "fresh") == greedy(PROMPT, 8, "weights of y")


def test_a_cancelled_request_lets_its_adapter_go(root: Path) -> None:
    core = engine(root)
    load(core, "x", "x")
    ask(core, "running", "x", max_tokens=100)
    core.step()
    core.unload_adapter(UnloadAdapter(request_id="bye", name="x"))
    core.abort(["running"])
    assert {output.request_id for output in core.step().outputs} == {"running", "bye"}


@pytest.mark.parametrize("path", ["../outside", "/etc", "missing", "", "x\0y", "link", "x/content"])
def test_only_folders_under_the_root_can_be_loaded(root: Path, path: str) -> None:
    (root.parent / "outside").mkdir()
    (root / "link").symlink_to(root.parent / "outside")
    with pytest.raises(InvalidRequestError, match="lora_path"):
        engine(root).load_adapter(LoadAdapter(request_id="a", name="a", path=path))


def test_an_absolute_path_under_the_root_is_fine(root: Path) -> None:
    core = engine(root)
    output = load(core, "x", str(root / "x"))
    assert output is not None
    assert output.error is None


def test_a_bad_folder_is_an_answer_and_not_the_end(root: Path) -> None:
    (root / "empty").mkdir()
    core = engine(root)
    output = load(core, "a", "empty")
    assert output is not None
    assert (output.error_kind, output.error_param) == ("InvalidRequestError", "lora_path")
    assert core.stats().adapters == []


def test_there_is_a_bound_and_a_name_is_taken_once(root: Path) -> None:
    core = engine(root, max_loras=1, max_cpu_loras=2)
    load(core, "a", "x")
    with pytest.raises(InvalidRequestError, match="loaded already"):
        core.load_adapter(LoadAdapter(request_id="r", name="a", path="x"))
    load(core, "b", "y")
    with pytest.raises(InvalidRequestError, match="unload one first"):
        core.load_adapter(LoadAdapter(request_id="r", name="c", path="z"))


def test_without_adapters_everything_about_them_is_refused() -> None:
    core = EngineCore(FakeRunner(), EngineConfig(model="fake"), lambda: 0.0)
    with pytest.raises(InvalidRequestError, match="not loaded"):
        ask(core, "r", "x")
    with pytest.raises(InvalidRequestError, match="enable_lora"):
        core.load_adapter(LoadAdapter(request_id="a", name="a", path="x"))


def test_adapters_of_the_configuration_are_there_at_the_start(root: Path) -> None:
    (root / "x" / "adapter_config.json").write_text("{}")
    config = EngineConfig(model="fake", enable_lora=True, lora_modules={"mine": str(root / "x")})
    core = build_engine(config, lambda _: None, lambda _config, _progress: FakeRunner())
    ask(core, "r", "mine")
    assert tokens(drain(core), "r") == greedy(PROMPT, 8, "weights of x")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"lora_root": "/x"}, "lora_root: needs enable_lora"),
        ({"lora_modules": {"a": "b"}}, "lora_modules: needs enable_lora"),
        ({"enable_lora": True, "max_loras": 4, "max_cpu_loras": 2}, "max_cpu_loras"),
        ({"enable_lora": True, "max_loras": 0}, "max_loras"),
        ({"enable_lora": True, "lora_modules": {"m": "b"}, "served_model_names": ("m",)}, "no name for an adapter"),
        ({"enable_lora": True, "max_loras": 1, "lora_modules": {f"a{i}": "b" for i in range(5)}}, "5 adapters"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        EngineConfig(model="fake", **settings).validate()  # type: ignore[arg-type]
