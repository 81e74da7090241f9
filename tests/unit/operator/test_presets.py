"""The built-in runtimes: they plan, and read the metrics pages of their engines as those write or document them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.validation import parse
from octavo_operator.autoscale.metrics import metric_names, parse_page, replica_sample
from octavo_operator.desired import plan_service
from octavo_operator.plan import Facts, Unplannable
from octavo_operator.plan.fields import PORTABLE_FIELDS
from octavo_operator.presets import preset, preset_names
from octavo_operator.render import render_plan

PAGES = Path(__file__).parents[2] / "fixtures" / "metrics"


def service(runtime: str, **spec: Any) -> InferenceService:
    spec.setdefault("model", {"storageUri": "hf://org/model", "aliases": ["b"]} if runtime == "vllm" else {
        "storageUri": "hf://org/model"})  # fmt: skip
    spec.setdefault("resources", {"limits": {"nvidia.com/gpu": 2}})
    document = {
        "apiVersion": "serving.octavo.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": "chat"},
        "spec": {"runtime": {"name": runtime}, **spec},
    }
    return parse(InferenceService, document)


@pytest.mark.parametrize(
    ("name", "waiting", "running", "kv"),
    [
        ("vllm", 5, 8, 0.0881542699724518),  # a whole page of vLLM 0.30 at work
        ("sglang", 2826, 162, 0.28),
        ("tgi", 3, 6, 0.25),
        ("tensorrt-llm", 1, 4, 0.5),
        ("triton", 2, 7, 0.4875),
        ("ray-serve", 9, 3, 0.625),
    ],
)
def test_each_engines_metrics_become_the_signals(name: str, waiting: float, running: float, kv: float) -> None:
    metrics = preset(name).spec.metrics
    for names in ((), metric_names(metrics)):  # the whole page, and only what is read of it
        page = parse_page((PAGES / f"{name}.txt").read_text(), 1.0, names)
        sample = replica_sample("r", page, metrics)
        assert (sample.waiting, sample.running, sample.kv_utilization) == (waiting, running, kv)


def test_torchserves_counters_of_latency_give_mean_numbers() -> None:
    text = (PAGES / "torchserve.txt").read_text()
    before = parse_page(text.replace("31000000.0", "1000000.0").replace("52000000.0", "2000000.0"), 0.0)
    sample = replica_sample("r", parse_page(text, 10.0), preset("torchserve").spec.metrics, before)
    assert (sample.waiting, sample.running) == (pytest.approx(3.0), pytest.approx(5.0))
    assert sample.kv_utilization is None


def test_vllm_is_told_its_names_and_sizes_in_its_own_words() -> None:
    subject = service(
        "vllm",
        parallelism={"tensor": 2},
        engine={"maxNumSeqs": 64, "kvCacheMemoryFraction": "0.9", "prefixCaching": True},
    )
    (workload,) = plan_service(subject, [], Facts()).workloads
    assert workload.argv[:6] == ("vllm", "serve", "org/model", "--served-model-name", "chat", "b")
    assert {"--tensor-parallel-size=2", "--max-num-seqs=64", "--gpu-memory-utilization=0.9"} <= set(workload.argv)
    assert workload.drain.pre_stop_sleep_s == 10


@pytest.mark.parametrize("name", [n for n in preset_names() if n not in ("octavo", "triton", "torchserve")])
def test_naming_the_runtime_is_all_a_user_writes(name: str) -> None:
    assert render_plan(plan_service(service(name), [], Facts()))


@pytest.mark.parametrize(("name", "model_format"), [("triton", "triton-repository"), ("torchserve", "torchscript")])
def test_runtimes_that_read_paths_take_volumes_and_refuse_addresses(name: str, model_format: str) -> None:
    on_volume = {"storageUri": "pvc://models/repo", "format": {"name": model_format}}
    (workload,) = plan_service(service(name, model=on_volume), [], Facts()).workloads
    assert any("/mnt/models/models/repo" in word for word in workload.argv)
    with pytest.raises(Unplannable, match="ModelCache"):
        plan_service(service(name, model={**on_volume, "storageUri": "s3://a/b"}), [], Facts())


@pytest.mark.parametrize("name", preset_names())
def test_flags_map_only_fields_that_exist(name: str) -> None:
    assert {f.field for f in preset(name).spec.container.flags} <= PORTABLE_FIELDS.keys()


def test_a_runtime_that_scales_itself_is_never_scaled_twice() -> None:
    with pytest.raises(Unplannable, match="scales its own workers"):
        plan_service(service("ray-serve", autoscaling={"maxReplicas": 3}), [], Facts())


def test_octavo_serve_knows_every_flag_that_its_runtime_passes() -> None:
    from typer.main import get_command

    from octavo_cli.main import build_app

    command = get_command(build_app("serve")).commands["serve"]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    container = preset("octavo").spec.container
    texts = [
        *container.args,
        *(f.flag or "" for f in container.flags),
        *(v for f in container.flags for v in f.values.values()),
    ]
    passed = {word for text in texts for word in text.split() if word.startswith("--")}
    assert passed
    assert passed <= known
