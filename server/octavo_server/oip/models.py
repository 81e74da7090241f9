"""The served model behind the v2 protocol, with the tensor names of Triton's vLLM backend."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from octavo_engine.messages import FinishReason
from octavo_server.caller import Caller
from octavo_server.errors import ApiError, bad_request
from octavo_server.generation import Delta, SequenceRequest
from octavo_server.oip.sampling import read_sampling
from octavo_server.oip.statistics import ModelStatistics
from octavo_server.oip.tensors import Tensor, TensorSpec
from octavo_server.openai.constraints import requested_constraint
from octavo_server.openai.sampling import sampling_params
from octavo_server.openai.sequences import truncate
from octavo_server.replica import Replica
from octavo_server.served_model import ServedModel

VERSION = "1"
ParameterValue = bool | int | float | str


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One inference, whatever the transport. `outputs`: names wanted; empty means all."""

    id: str
    inputs: Mapping[str, Tensor]
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class InferResponse:
    """One response; a decoupled request gets several and `final` marks the last."""

    outputs: Sequence[Tensor]
    final: bool = True


class V2Model(Protocol):
    """A model as the protocol sees it."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def platform(self) -> str: ...
    @property
    def backend(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def decoupled(self) -> bool:
        """Whether one request may get several responses."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def statistics(self) -> ModelStatistics: ...
    @property
    def execution_count(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...

    def infer(self, request: InferRequest, caller: Caller) -> AsyncGenerator[InferResponse, None]:
        """Every response of a request; raises `ApiError`."""

    async def infer_once(self, request: InferRequest, caller: Caller) -> InferResponse:
        """The only response of a request; raises `ApiError`."""


class ServedV2Model:
    """The replica's model, or one of its adapters, as v2 clients see it: text in, text or vector out."""

    def __init__(self, replica: Replica, adapter: str = "") -> None:
        self._replica = replica
        self._adapter = adapter
        self.statistics = ModelStatistics()

    @property
    def name(self) -> str:
        return self._adapter or self.served.name

    @property
    def version(self) -> str:
        return VERSION

    @property
    def backend(self) -> str:
        return "octavo"

    @property
    def device(self) -> str:
        return self.served.info.device

    @property
    def decoupled(self) -> bool:
        return self.generates

    @property
    def execution_count(self) -> int:
        return self.statistics.success.count

    @property
    def memory_bytes(self) -> int:
        return self.served.info.weight_bytes

    @property
    def served(self) -> ServedModel:
        return self._replica.served

    @property
    def generates(self) -> bool:
        return self.served.info.task == "generate"

    @property
    def platform(self) -> str:
        return "octavo"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return _GENERATE_INPUTS if self.generates else (_TEXT_INPUT,)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        if self.generates:
            return _GENERATE_OUTPUTS
        return (TensorSpec("embedding", "FP32", (self.served.info.hidden_size,)),)

    async def infer(self, request: InferRequest, caller: Caller) -> AsyncGenerator[InferResponse, None]:
        """Run one request; several responses when its `stream` input is true. Raises `ApiError`."""
        started = time.perf_counter_ns()
        try:
            self._check_tensors(request)
            run = self._generate(request, caller) if self.generates else self._embed(request, caller)
            async with contextlib.aclosing(run):
                async for response in run:
                    yield _only(response, request.outputs)
        except ApiError:
            self.statistics.failed(time.perf_counter_ns() - started)
            raise
        self.statistics.succeeded(time.perf_counter_ns() - started)

    async def infer_once(self, request: InferRequest, caller: Caller) -> InferResponse:
        """The single response of a request that does not stream; raises a 400 for one that does."""
        if _flag(request.inputs, "stream", False):
            raise bad_request("inputs.stream: must be false here; use generate_stream or gRPC streams", "stream")
        async with contextlib.aclosing(self.infer(request, caller)) as run:
            (response,) = [response async for response in run]
            return response

    def _check_tensors(self, request: InferRequest) -> None:
        specs = {spec.name: spec for spec in self.inputs}
        for name, tensor in request.inputs.items():
            if name not in specs:
                raise bad_request(f"inputs.{name[:40]}: unknown; this model takes {', '.join(specs)}", name[:40])
            if tensor.datatype != specs[name].datatype:
                raise bad_request(f"inputs.{name}: must be {specs[name].datatype}, got {tensor.datatype}", name)
        if _TEXT_INPUT.name not in request.inputs:
            raise bad_request("inputs.text_input: missing; this input is required", "text_input")
        known = {spec.name for spec in self.outputs}
        for name in request.outputs:
            if name not in known:
                raise bad_request(f"outputs.{name[:40]}: unknown; this model gives {', '.join(sorted(known))}", name)

    async def _generate(self, request: InferRequest, caller: Caller) -> AsyncGenerator[InferResponse, None]:
        options = _Options.read(request.inputs)
        replica, served = self._replica, self.served
        sequence = await replica.prepare(self._sequence, request, options, caller)
        collected = _Collected(len(sequence.prompt_token_ids), options)
        deltas = await replica.generator.start([sequence])
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                collected.add(delta)
                final = delta.finish_reason is not None
                if options.stream and (delta.text or final):
                    yield InferResponse(collected.tensors(delta.text), final)
        if not options.stream:
            prefix = _text(request.inputs, served) if options.prepends_input else ""
            yield InferResponse(collected.tensors(prefix + collected.text))

    def _sequence(self, request: InferRequest, options: _Options, caller: Caller) -> SequenceRequest:
        served = self.served
        text = _text(request.inputs, served)
        fields = read_sampling(options.sampling)
        constraint = requested_constraint(fields)
        asked = fields.max_tokens or 16
        ids = served.tokenizer.encode(text, add_special_tokens=fields.add_special_tokens is not False)
        ids = truncate(ids, fields, served.info.max_model_len - asked)
        budget = served.token_budget(
            len(ids), asked, prompt_param="text_input", max_param="sampling_parameters.max_tokens"
        )
        sampling = sampling_params(
            fields,
            served,
            max_tokens=budget,
            logprobs=0 if options.wants_logprobs else None,
            structured=None if constraint is None else constraint.structured,
        )
        return SequenceRequest(
            index=0,
            request_id=f"v2-{uuid.uuid4().hex}",
            prompt_token_ids=ids,
            sampling=sampling,
            caller=caller,
            cache_salt=caller.cache_salt(fields.cache_salt),
            priority=caller.priority if caller.priority is not None else fields.priority or 0,
            adapter=self._adapter,
            continues_prompt=True,
            structured_param="" if constraint is None else constraint.param,
        )

    async def _embed(self, request: InferRequest, caller: Caller) -> AsyncGenerator[InferResponse, None]:
        vectors = await self._replica.embedder.embed_texts(
            [element.decode(errors="replace") for element in request.inputs["text_input"].elements()],
            caller,
            param="text_input",
        )
        matrix = np.asarray([vector.values for vector in vectors], dtype=np.float32)
        yield InferResponse([Tensor.of_numbers("embedding", "FP32", matrix)])


def with_parameters(caller: Caller, request: InferRequest) -> Caller:
    """The caller with the protocol's own `timeout` (microseconds) and `priority` (1 is the highest, 0 the default).

    Headers of the gateway win over what the request asks for itself.
    """
    timeout_us, priority = request.parameters.get("timeout"), request.parameters.get("priority")
    for name, value in (("timeout", timeout_us), ("priority", priority)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise bad_request(f"parameters.{name}: must be an integer of at least 0", name)
    if caller.deadline_s is None and isinstance(timeout_us, int) and timeout_us > 0:
        caller = dataclasses.replace(caller, deadline_s=timeout_us / 1e6)
    if caller.priority is None and isinstance(priority, int) and priority > 0:
        # There 1 is the most urgent and anything above 0 precedes the default; here lower runs earlier.
        caller = dataclasses.replace(caller, priority=-max(1, 1_000 - priority))
    return caller


@dataclass(frozen=True, slots=True)
class _Options:
    """The optional inputs of the generating signature."""

    stream: bool
    prepends_input: bool
    sampling: bytes
    finish_reason: bool
    cumulative_logprob: bool
    logprobs: bool
    num_input_tokens: bool
    num_output_tokens: bool

    @property
    def wants_logprobs(self) -> bool:
        return self.cumulative_logprob or self.logprobs

    @classmethod
    def read(cls, inputs: Mapping[str, Tensor]) -> _Options:
        stream = _flag(inputs, "stream", False)
        excludes = _flag(inputs, "exclude_input_in_output", stream)
        if stream and not excludes:
            raise bad_request("inputs.exclude_input_in_output: must be true in a stream", "exclude_input_in_output")
        sampling = inputs.get("sampling_parameters")
        return cls(
            stream=stream,
            prepends_input=not excludes,
            sampling=b"" if sampling is None else _single(sampling),
            finish_reason=_flag(inputs, "return_finish_reason", False),
            cumulative_logprob=_flag(inputs, "return_cumulative_logprob", False),
            logprobs=_flag(inputs, "return_logprobs", False),
            num_input_tokens=_flag(inputs, "return_num_input_tokens", False),
            num_output_tokens=_flag(inputs, "return_num_output_tokens", False),
        )


class _Collected:
    """What a sequence produced so far, as the optional outputs report it."""

    def __init__(self, num_prompt_tokens: int, options: _Options) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._options = options
        self._parts: list[str] = []
        self._logprobs: list[float] = []
        self._num_tokens = 0
        self._finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def add(self, delta: Delta) -> None:
        self._parts.append(delta.text)
        self._num_tokens += len(delta.token_ids)
        self._logprobs += [entry.logprob for entry in delta.logprobs or []]
        self._finish_reason = delta.finish_reason

    def tensors(self, text: str) -> list[Tensor]:
        options = self._options
        tensors = [Tensor.of_bytes("text_output", [text.encode()])]
        if options.finish_reason:
            reason = "" if self._finish_reason is None else self._finish_reason.value
            tensors.append(Tensor.of_bytes("finish_reason", [reason.encode()]))
        if options.cumulative_logprob:
            tensors.append(Tensor.of_numbers("cumulative_logprob", "FP32", [sum(self._logprobs)]))
        if options.logprobs:
            tensors.append(Tensor.of_numbers("logprobs", "FP32", self._logprobs))
        if options.num_input_tokens:
            tensors.append(Tensor.of_numbers("num_input_tokens", "UINT32", [self._num_prompt_tokens]))
        if options.num_output_tokens:
            tensors.append(Tensor.of_numbers("num_output_tokens", "UINT32", [self._num_tokens]))
        return tensors


def _flag(inputs: Mapping[str, Tensor], name: str, default: bool) -> bool:
    tensor = inputs.get(name)
    if tensor is None:
        return default
    if tensor.num_elements != 1 or tensor.datatype != "BOOL":
        raise bad_request(f"inputs.{name}: takes one BOOL element, got shape {list(tensor.shape)}", name)
    return bool(tensor.numbers().reshape(-1)[0])


def _single(tensor: Tensor) -> bytes:
    elements = tensor.elements()
    if len(elements) != 1:
        raise bad_request(f"inputs.{tensor.name}: takes one element, got shape {list(tensor.shape)}", tensor.name)
    return elements[0]


def _text(inputs: Mapping[str, Tensor], served: ServedModel) -> str:
    data = _single(inputs["text_input"])
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise bad_request("inputs.text_input: is not valid UTF-8", "text_input") from None
    served.check_characters(text, "text_input")
    return text


def _only(response: InferResponse, names: tuple[str, ...]) -> InferResponse:
    if not names:
        return response
    return InferResponse([tensor for tensor in response.outputs if tensor.name in names], response.final)


_TEXT_INPUT = TensorSpec("text_input", "BYTES", (1,))
_GENERATE_INPUTS = (
    _TEXT_INPUT,
    TensorSpec("stream", "BOOL", (1,), optional=True),
    TensorSpec("sampling_parameters", "BYTES", (1,), optional=True),
    *(
        TensorSpec(name, "BOOL", (1,), optional=True)
        for name in (
            "exclude_input_in_output", "return_finish_reason", "return_cumulative_logprob", "return_logprobs",
            "return_num_input_tokens", "return_num_output_tokens",
        )
    ),
)  # fmt: skip
_GENERATE_OUTPUTS = (
    TensorSpec("text_output", "BYTES", (-1,)),
    TensorSpec("finish_reason", "BYTES", (-1,)),
    TensorSpec("cumulative_logprob", "FP32", (-1,)),
    TensorSpec("logprobs", "FP32", (-1,)),
    TensorSpec("num_input_tokens", "UINT32", (1,)),
    TensorSpec("num_output_tokens", "UINT32", (-1,)),
)
