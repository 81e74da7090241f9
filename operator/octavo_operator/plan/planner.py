"""plan(service, runtime, facts) -> Plan: what to run for a service. Pure; asks nobody."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from octavo_operator.api.autoscaling import ColdStart
from octavo_operator.api.errors import FieldError
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.kubernetes import EnvVar, EnvVarSource
from octavo_operator.api.serving_runtime import (
    AdapterSupport,
    ClusterServingRuntime,
    DrainMethod,
    Probe,
    ServingRuntime,
    ServingRuntimeSpec,
    StartupProbe,
)
from octavo_operator.autoscale.policy import ScalingPolicy, policy_of
from octavo_operator.plan.accelerators import device_errors
from octavo_operator.plan.arguments import command_line
from octavo_operator.plan.fields import portable_values
from octavo_operator.plan.fit import estimate_fit
from octavo_operator.plan.runtime import check_support, image_of, replica_nodes
from octavo_operator.plan.shape import Fit
from octavo_operator.plan.source import ModelSource, adapter_sources, model_source
from octavo_operator.plan.values import (
    DrainPlan,
    EnvReference,
    Facts,
    HttpProbe,
    Plan,
    Probes,
    ReplicaBounds,
    Resources,
    RoutingPlan,
    Target,
    Unplannable,
    Workload,
)
from octavo_operator.presets import preset

Runtime = ServingRuntime | ClusterServingRuntime
GPU_PRODUCT_LABEL = "nvidia.com/gpu.product"


def plan(service: InferenceService, runtime: Runtime | None = None, facts: Facts | None = None) -> Plan:
    """What to run for a service; without a runtime, on Octavo's own engine.

    Raises `Unplannable` with every field that this runtime cannot honour.
    """
    runtime = runtime or preset("octavo")
    facts = facts or Facts()
    if facts.target is Target.LOCAL:
        service = _without_propagation(service)
    resources = _resources(service)
    errors = check_support(service, runtime.spec, resources)
    errors += device_errors(service, runtime.spec.engine)
    if service.spec.routing.kv_events and service.spec.parallelism.data > 1:
        errors.append(
            FieldError("spec.routing.kvEvents", "several engines in a replica cannot tell; use more replicas")
        )
    source, source_errors = model_source(service, runtime.spec, facts)
    adapters, adapter_errors = adapter_sources(service, runtime.spec, facts)
    names = {"MODEL_URI": source.uri, "MODEL_PATH": source.uri, "MODEL_NAME": service.model_name}
    values = portable_values(service, resources)
    if not source.takes_revision:
        values.pop("model.revision", None)
    extra = tuple(service.spec.engine.extra_args)
    if facts.target is Target.LOCAL:  # nobody loads adapters into running engines there
        extra = (*_adapters_at_start(runtime.spec, adapters), *extra)
    argv, argument_errors = command_line(runtime.spec.container, values, names, extra)
    errors += source_errors + adapter_errors + argument_errors
    nodes, node_errors = replica_nodes(service, runtime.spec, resources)
    errors += node_errors
    if errors:
        raise Unplannable("UnsupportedField", errors)
    workload = _workload(service, runtime.spec, facts, resources, argv, source, adapters, nodes)
    fit = estimate_fit(service, resources, runtime.spec.supports, shape) if (shape := facts.model.shape) else None
    return Plan(
        workloads=(workload,),
        warnings=tuple(_warnings(service, workload)),
        runtime=runtime.metadata.name,
        waiting_for=source.waiting_for,
        fit=fit if isinstance(fit, Fit) else None,
        not_estimated=fit if isinstance(fit, str) else "" if fit else facts.model.unknown,
        model=facts.model,
    )


def _adapters_at_start(runtime: ServingRuntimeSpec, adapters: Mapping[str, ModelSource]) -> list[str]:
    words = (runtime.adapter_api.at_start or "").split()
    return [
        word.replace("{name}", name).replace("{path}", source.uri)
        for name, source in adapters.items()
        for word in words
    ]


def _without_propagation(service: InferenceService) -> InferenceService:
    """On one machine the gateway hears at once that a replica ends; there is nothing to wait for."""
    drain = service.spec.drain.model_copy(update={"propagation_seconds": 0})
    return service.model_copy(update={"spec": service.spec.model_copy(update={"drain": drain})})


def _workload(
    service: InferenceService,
    runtime: ServingRuntimeSpec,
    facts: Facts,
    resources: Resources,
    argv: tuple[str, ...],
    source: ModelSource,
    adapters: Mapping[str, ModelSource],
    nodes: int,
) -> Workload:
    spec = service.spec
    scaling = _scaling(service, runtime)
    env, references = _environment(service, runtime)
    accelerator = spec.accelerator
    return Workload(
        name=service.name,
        namespace=service.namespace,
        service=service.name,
        model_names=(service.model_name, *spec.model.aliases),
        task=spec.model.task.value,
        engine=runtime.engine,
        image=image_of(runtime, resources, facts),
        replicas=ReplicaBounds(scaling.min_replicas, scaling.max_replicas, scaling.min_replicas),
        argv=(*argv, *runtime.multi_node.leader_args) if nodes > 1 else argv,
        env=env,
        env_references=references,
        port=runtime.port,
        grpc_port=runtime.grpc_port,
        probes=_probes(runtime),
        drain=DrainPlan(
            propagation_s=spec.drain.propagation_seconds,
            timeout_s=spec.drain.timeout_seconds,
            engine_waits=runtime.drain.method is DrainMethod.SIGTERM,
        ),
        resources=resources,
        scaling=scaling,
        routing=_routing(service),
        metrics=runtime.metrics,
        protocols=tuple(runtime.protocols),
        claims=tuple(dict.fromkeys((*source.claims, *(c for found in adapters.values() for c in found.claims)))),
        run_as_user=runtime.container.run_as_user,
        writable_root=runtime.container.writable_root,
        scheduling=spec.scheduling,
        node_labels=_frozen({GPU_PRODUCT_LABEL: accelerator.type} if accelerator and accelerator.type else {}),
        resource_claims=tuple(accelerator.resource_claims) if accelerator else (),
        rollout=spec.rollout,
        observability=spec.observability,
        pod_template=spec.pod_template or {},
        credentials=spec.model.credentials_secret_ref,
        nodes=nodes,
        worker_argv=(*argv, *runtime.multi_node.worker_args) if nodes > 1 else (),
        leader_worker_set=facts.leader_worker_set,
        adapters=_frozen({name: found.uri for name, found in adapters.items()}),
        adapter_api=runtime.adapter_api if runtime.supports.adapters is AdapterSupport.DYNAMIC else None,
    )


def _scaling(service: InferenceService, runtime: ServingRuntimeSpec) -> ScalingPolicy:
    policy = policy_of(service.spec)
    if runtime.scaling.owned_by_runtime and policy.scales:
        raise Unplannable(
            "UnsupportedField",
            [FieldError("spec.autoscaling", "this runtime scales its own workers; remove autoscaling")],
        )
    return policy


def _resources(service: InferenceService) -> Resources:
    """Limits count as requests where none are given, as the API server does."""
    written = service.spec.resources
    limits = {name: str(value) for name, value in written.limits.items()}
    requests = {**limits, **{name: str(value) for name, value in written.requests.items()}}
    return Resources(limits=_frozen(limits), requests=_frozen(requests))


def _environment(
    service: InferenceService, runtime: ServingRuntimeSpec
) -> tuple[Mapping[str, str], tuple[EnvReference, ...]]:
    """The runtime's variables, overridden by the service's; the hub's token is passed by reference."""
    merged = {variable.name: variable for variable in (*runtime.container.env, *service.spec.engine.env)}
    secret = service.spec.model.credentials_secret_ref
    if secret is not None:
        name = _credential_variable(service.spec.model.storage_uri)
        merged.setdefault(name, EnvVar(name=name, value_from=EnvVarSource(secret_key_ref=secret)))
    plain = {v.name: v.value or "" for v in merged.values() if v.value_from is None}
    references = tuple(EnvReference(v.name, v.value_from) for v in merged.values() if v.value_from is not None)
    return _frozen(plain), references


def _credential_variable(storage_uri: str) -> str:
    return "HF_TOKEN" if storage_uri.startswith("hf://") else "OCTAVO_STORAGE_TOKEN"


def _probes(runtime: ServingRuntimeSpec) -> Probes:
    probes = runtime.probes
    return Probes(
        startup=_startup(probes.startup), readiness=_probe(probes.readiness), liveness=_probe(probes.liveness)
    )


def _startup(probe: StartupProbe) -> HttpProbe:
    attempts = -(-probe.timeout_seconds // probe.period_seconds)
    return HttpProbe(probe.path, probe.period_seconds, min(5, probe.period_seconds), attempts)


def _probe(probe: Probe) -> HttpProbe:
    return HttpProbe(probe.path, probe.period_seconds, probe.timeout_seconds, probe.failure_threshold)


def _routing(service: InferenceService) -> RoutingPlan:
    routing = service.spec.routing
    autoscaling = service.spec.autoscaling
    cold_start = autoscaling.cold_start if autoscaling else ColdStart()
    per_try = routing.retry.per_try_timeout_seconds
    return RoutingPlan(
        strategy=routing.strategy.value,
        session_header=routing.session_header,
        saturation_queue_depth=routing.saturation.queue_depth,
        saturation_kv_cache_utilization=float(routing.saturation.kv_cache_utilization),
        max_held_requests=cold_start.max_held_requests,
        hold_timeout_s=float(cold_start.hold_timeout_seconds),
        retry_attempts=routing.retry.attempts,
        retry_per_try_timeout_s=None if per_try is None else float(per_try),
        priority=routing.priority,
        kv_events=routing.kv_events,
    )


def _warnings(service: InferenceService, workload: Workload) -> list[str]:
    warnings = []
    revision, uri = service.spec.model.revision, service.spec.model.storage_uri
    if uri.startswith("hf://") and not _is_commit(revision) and workload.replicas.max > 1:
        warnings.append(
            "spec.model.revision is not a commit: replicas started at different times may load different weights"
        )
    rollout = service.spec.rollout
    if workload.nodes > 1 and not workload.leader_worker_set:
        warnings.append(
            "spec.rollout: replicas that span nodes are replaced in place, each away until it is ready again"
        )
    elif workload.resources.accelerators and rollout.max_unavailable == 0:
        spare = f"{workload.resources.accelerators * workload.nodes} spare {workload.resources.accelerator}"
        warnings.append(
            f"spec.rollout: replicas are replaced by surge, so this takes {spare}; with none to spare, use maxSurge: 0 "
            "and maxUnavailable: 1"
        )
    return warnings


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)


def _frozen(values: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType(dict(values))
