from __future__ import annotations

from typing import Any

import pytest

from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.serving_runtime import ClusterServingRuntime, ServingRuntime
from octavo_operator.api.validation import parse
from octavo_operator.plan import Facts, Unplannable, local_refusals, plan
from octavo_operator.plan.runtime import choose_runtime, image_of
from octavo_operator.plan.values import ModelClaim, Resources, Target, Workload
from octavo_operator.presets import preset


def service(**spec: Any) -> InferenceService:
    spec.setdefault("model", {"storageUri": "hf://org/model"})
    return parse(
        InferenceService,
        {
            "apiVersion": "serving.octavo.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": "chat", "namespace": "team"},
            "spec": spec,
        },
        local=True,
    )


def runtime(kind: str = "ClusterServingRuntime", **changes: Any) -> Any:
    spec = {
        "engine": "other",
        "supportedModelFormats": [{"name": "safetensors", "autoSelect": True, "priority": 5}],
        "supports": {"cpu": True},
        "container": {"image": "engine:1", "command": ["serve"], "args": ["--model=$(MODEL_URI)", "--p=$(PORT)"]},
        "probes": {
            "startup": {"path": "/health"},
            "readiness": {"path": "/health"},
            "liveness": {"path": "/health"},
        },
        **changes,
    }
    name = changes.pop("name", "other")
    spec.pop("name", None)
    model = ServingRuntime if kind == "ServingRuntime" else ClusterServingRuntime
    return parse(
        model,
        {
            "apiVersion": "serving.octavo.dev/v1alpha1",
            "kind": kind,
            "metadata": {"name": name, "namespace": "team"},
            "spec": spec,
        },
    )


def workload(subject: InferenceService, facts: Facts | None = None) -> Workload:
    (only,) = plan(subject, None, facts).workloads
    return only


def option(argv: tuple[str, ...], name: str) -> list[str]:
    """Values of every occurrence of an option."""
    return [argv[i + 1] for i, word in enumerate(argv) if word == name]


def test_octavo_serve_is_told_model_names_and_where_to_listen() -> None:
    argv = workload(service(model={"storageUri": "hf://org/model", "name": "m", "aliases": ["a", "b"]})).argv
    assert argv[:4] == ("octavo", "serve", "--model", "hf://org/model")
    assert option(argv, "--served-model-name") == ["m", "a", "b"]
    assert option(argv, "--host") == ["{host}"]
    assert option(argv, "--port") == ["{port}"]


def test_every_portable_field_reaches_the_command_line() -> None:
    subject = service(
        model={
            "storageUri": "hf://org/model",
            "revision": "main",
            "maxModelLen": 4096,
            "dtype": "BFloat16",
            "task": "Embed",
            "quantization": {"weights": "Int4", "kvCache": "FP8"},
        },
        resources={"limits": {"cpu": "3500m"}},
        engine={
            "maxNumSeqs": 8,
            "maxBatchedTokens": 512,
            "maxPartialPrefills": 2,
            "blockSize": 32,
            "numKvBlocks": 100,
            "kvCacheMemory": "1Gi",
            "prefixCaching": False,
            "maxQueuedRequests": 9,
            "maxQueuedTokens": 99,
            "seed": 3,
            "logLevel": "debug",
            "extraArgs": ["--chat-template", "x.jinja"],
        },
        drain={"propagationSeconds": 4, "timeoutSeconds": 40},
        observability={"tracing": {"endpoint": "http://otel:4317"}},
    )
    argv = " ".join(workload(subject).argv)
    assert argv.endswith(
        "--revision main --task embed --max-model-len 4096 --dtype bfloat16 --quantization int4 --kv-cache-dtype fp8 "
        "--device cpu --max-num-seqs 8 --max-num-batched-tokens 512 --max-num-partial-prefills 2 --block-size 32 "
        "--num-kv-blocks 100 --kv-cache-memory-bytes 1073741824 --no-enable-prefix-caching --max-queued-requests 9 "
        "--max-queued-tokens 99 --num-threads 3 --seed 3 --log-level debug --drain-propagation 4 --drain-timeout 40 "
        "--otlp-endpoint http://otel:4317 --chat-template x.jinja"
    )


def test_a_field_that_the_runtime_cannot_express_is_refused_never_dropped() -> None:
    with pytest.raises(Unplannable) as caught:
        plan(service(engine={"maxNumSeqs": 8, "seed": 1}), runtime())
    assert caught.value.reason == "UnsupportedField"
    assert [e.path for e in caught.value.errors] == ["spec.engine.maxNumSeqs", "spec.engine.seed"]


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"model": {"storageUri": "hf://o/m", "task": "Transcribe"}}, "spec.model.task"),
        ({"model": {"storageUri": "hf://o/m", "format": {"name": "onnx"}}}, "spec.model.format"),
    ],
)  # fmt: skip
def test_what_the_engine_cannot_do_is_refused(spec: dict[str, Any], path: str) -> None:
    with pytest.raises(Unplannable) as caught:
        plan(service(**spec))
    assert path in [e.path for e in caught.value.errors]


def test_adapters_are_switched_on_where_the_runtime_serves_them() -> None:
    adapters = {"items": [{"name": "a", "storageUri": "pvc://disk/a"}], "maxLoaded": 3, "maxRank": 32}
    subject = service(model={"storageUri": "hf://o/m", "adapters": adapters})
    argv = " ".join(workload(subject).argv)
    assert "--enable-lora --lora-root /mnt/models --max-cpu-loras 1024 --max-loras 3 --max-lora-rank 32" in argv
    with pytest.raises(Unplannable) as caught:
        plan(subject, runtime())
    assert "spec.model.adapters" in [e.path for e in caught.value.errors]


def test_octavos_engine_takes_a_draft_model_host_memory_and_scoring() -> None:
    speculative = {"draftStorageUri": "hf://o/small", "numTokens": 3}
    subject = service(
        model={"storageUri": "hf://o/m", "speculative": speculative}, engine={"kvOffload": {"cpu": "1Gi"}}
    )
    argv = " ".join(workload(subject).argv)
    assert "--speculative-model hf://o/small --num-speculative-tokens 3" in argv
    assert "--kv-host-memory-bytes 1073741824" in argv
    assert "--task classify" in " ".join(workload(service(model={"storageUri": "hf://o/m", "task": "Score"})).argv)


def test_in_local_mode_adapters_are_loaded_as_the_engine_starts() -> None:
    adapters = {"items": [{"name": "sql", "storageUri": "file:///adapters/sql"}]}
    subject = service(model={"storageUri": "hf://o/m", "adapters": adapters})
    (planned,) = plan(subject, facts=Facts(target=Target.LOCAL)).workloads
    at = planned.argv.index("--lora-modules")
    assert planned.argv[at + 1] == "sql=file:///adapters/sql"
    assert "--enable-lora" in planned.argv
    assert local_refusals(subject) == []
    on_a_volume = {"items": [{"name": "sql", "storageUri": "pvc://disk/sql"}]}
    refused = service(model={"storageUri": "hf://o/m", "adapters": on_a_volume})
    assert [e.path for e in local_refusals(refused)] == ["spec.model.adapters"]


def test_octavos_engine_reads_adapters_from_volumes_only() -> None:
    adapters = {"items": [{"name": "a", "storageUri": "hf://o/a"}]}
    with pytest.raises(Unplannable) as caught:
        plan(service(model={"storageUri": "hf://o/m", "adapters": adapters}))
    assert [e.path for e in caught.value.errors] == ["spec.model.adapters.items[0].storageUri"]


def test_a_runtime_without_cpu_support_needs_an_accelerator() -> None:
    gpu_only = runtime(supports={})
    with pytest.raises(Unplannable, match="needs an accelerator"):
        plan(service(), gpu_only)
    plan(service(resources={"limits": {"nvidia.com/gpu": 1}}), gpu_only)


def test_requests_default_to_limits() -> None:
    resources = workload(
        service(resources={"limits": {"cpu": "2", "memory": "4Gi"}, "requests": {"cpu": "1"}})
    ).resources
    assert dict(resources.requests) == {"cpu": "1", "memory": "4Gi"}


def test_grace_covers_propagation_and_drain_with_a_margin() -> None:
    drain = workload(service(drain={"propagationSeconds": 7, "timeoutSeconds": 100})).drain
    assert drain.grace_period_s == 122
    assert drain.pre_stop_sleep_s == 0, "octavo's own engine waits for propagation itself"


def test_an_engine_that_does_not_wait_sleeps_before_it_is_told_to_stop() -> None:
    (only,) = plan(service(drain={"propagationSeconds": 7}), runtime()).workloads
    assert only.drain.pre_stop_sleep_s == 7


def test_starting_may_take_what_the_runtime_allows() -> None:
    assert workload(service()).probes.startup_timeout_s == 1800


@pytest.mark.parametrize(
    ("spec", "bounds"),
    [
        ({}, (1, 1, 1)),
        ({"replicas": 3}, (3, 3, 3)),
        ({"suspend": True, "replicas": 3}, (0, 0, 0)),
        ({"autoscaling": {"minReplicas": 2, "maxReplicas": 5}}, (2, 5, 2)),
        ({"autoscaling": {"minReplicas": 0, "maxReplicas": 5, "scaleToZero": {}}}, (0, 5, 0)),
        ({"autoscaling": {"mode": "External"}, "replicas": 4}, (4, 4, 4)),
    ],
)
def test_bounds_follow_the_spec(spec: dict[str, Any], bounds: tuple[int, int, int]) -> None:
    replicas = workload(service(**spec)).replicas
    assert (replicas.min, replicas.max, replicas.initial) == bounds


def test_a_volume_is_mounted_and_read_by_path() -> None:
    only = workload(service(model={"storageUri": "pvc://weights/llama/8b", "revision": "x"}))
    assert option(only.argv, "--model") == ["/mnt/models/weights/llama/8b"]
    assert option(only.argv, "--revision") == []
    assert [(c.claim, c.mount_path) for c in only.claims] == [("weights", "/mnt/models/weights")]


def test_a_service_waits_for_its_model_cache() -> None:
    subject = service(model={"storageUri": "hf://o/m", "cacheRef": {"name": "m"}})
    assert "does not exist" in plan(subject).waiting_for
    loading = Facts(model_claims={"m": ModelClaim("m-model", "model", ready=False, message="40 %")})
    assert plan(subject, None, loading).waiting_for == "ModelCache m: 40 %"
    ready = Facts(model_claims={"m": ModelClaim("m-model", "model")})
    planned = plan(subject, None, ready)
    assert planned.waiting_for == ""
    assert option(planned.workloads[0].argv, "--model") == ["/mnt/model-cache/model"]


def test_credentials_are_passed_by_reference_only() -> None:
    subject = service(model={"storageUri": "hf://o/m", "credentialsSecretRef": {"name": "hub", "key": "token"}})
    only = workload(subject)
    assert "HF_TOKEN" not in only.env
    assert [(r.name, r.source.secret_key_ref) for r in only.env_references] == [
        ("HF_TOKEN", subject.spec.model.credentials_secret_ref)
    ]


def test_the_services_environment_wins_over_the_runtimes() -> None:
    chosen = runtime(
        container={"image": "i", "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "1"}]},
    )
    (only,) = plan(service(engine={"env": [{"name": "B", "value": "2"}]}), chosen).workloads
    assert dict(only.env) == {"A": "1", "B": "2"}


def test_a_namespaces_own_runtime_wins_then_priority_then_name() -> None:
    own = runtime("ServingRuntime", name="own")
    cluster = [runtime(name="a"), preset("octavo")]
    assert choose_runtime(service(), [*cluster, own]).metadata.name == "own"
    assert choose_runtime(service(), cluster).metadata.name == "octavo"
    assert choose_runtime(service(), [runtime(name="b"), runtime(name="a")]).metadata.name == "a"


def test_a_runtime_of_another_namespace_is_not_seen() -> None:
    foreign = runtime("ServingRuntime", name="own").model_copy(
        update={"metadata": preset("octavo").metadata.model_copy(update={"name": "own", "namespace": "elsewhere"})}
    )
    with pytest.raises(Unplannable, match="no runtime loads"):
        choose_runtime(service(), [foreign])


def test_a_runtime_that_is_named_but_absent_lists_those_there_are() -> None:
    with pytest.raises(Unplannable, match=r"there are: octavo") as caught:
        choose_runtime(service(runtime={"name": "vlm"}), [preset("octavo")])
    assert caught.value.reason == "RuntimeNotFound"


def test_the_image_follows_the_device_and_the_release() -> None:
    spec = runtime(accelerators=[{"resource": "cpu", "imageSuffix": "-cpu"}]).spec
    gpu = Resources(limits={"nvidia.com/gpu": "1"})
    assert image_of(spec, Resources(), Facts()) == "engine:1-cpu"
    assert image_of(spec, gpu, Facts()) == "engine:1"
    assert image_of(preset("octavo").spec, gpu, Facts(engine_image="mine@sha256:1")) == "mine@sha256:1"


def test_surge_on_accelerators_and_floating_revisions_are_warned_about() -> None:
    subject = service(replicas=2, resources={"limits": {"nvidia.com/gpu": 1}})
    assert len(plan(subject).warnings) == 2
    fixed = service(model={"storageUri": "hf://o/m", "revision": "a" * 40}, replicas=2)
    assert plan(fixed).warnings == ()


def test_local_mode_refuses_cluster_fields_by_path() -> None:
    subject = service(
        model={
            "storageUri": "pvc://a/b",
            "cacheRef": {"name": "c"},
            "credentialsSecretRef": {"name": "s", "key": "k"},
        },
        runtime={"name": "vllm"},
        scheduling={"nodeSelector": {"a": "b"}},
        podTemplate={"spec": {}},
        engine={"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]},
        autoscaling={"mode": "External"},
        replicas=1,
    )
    assert [e.path for e in local_refusals(subject)] == [
        "spec.runtime.name",
        "spec.model.storageUri",
        "spec.model.cacheRef",
        "spec.model.credentialsSecretRef",
        "spec.autoscaling.mode",
        "spec.scheduling",
        "spec.podTemplate",
        "spec.engine.env[0].valueFrom",
    ]


def test_local_mode_takes_files_and_what_works_everywhere() -> None:
    subject = service(model={"storageUri": "file:///m.gguf"}, resources={"limits": {"cpu": "1"}})
    assert local_refusals(subject) == []
    assert option(workload(subject, Facts(target=Target.LOCAL)).argv, "--model") == ["file:///m.gguf"]


def test_kv_events_are_refused_where_nobody_could_tell() -> None:
    with pytest.raises(Unplannable) as caught:
        plan(service(routing={"kvEvents": True}, parallelism={"data": 2}))
    assert [error.path for error in caught.value.errors] == ["spec.routing.kvEvents"]
    with pytest.raises(Unplannable) as caught:
        plan(service(routing={"kvEvents": True}), preset("vllm"))
    assert "spec.routing.kvEvents" in [error.path for error in caught.value.errors]
