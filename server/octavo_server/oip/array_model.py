"""Models of arrays in files, whatever computes them, behind the v2 protocol and batched dynamically."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from octavo_server.caller import Caller
from octavo_server.errors import INTERNAL_ERROR, ApiError, bad_request
from octavo_server.oip.dynamic_batcher import Array, Arrays, DynamicBatcher
from octavo_server.oip.models import InferRequest, InferResponse
from octavo_server.oip.statistics import ModelStatistics
from octavo_server.oip.tensors import Tensor, TensorSpec

MAX_ROWS = 64


class InvalidTensorsError(Exception):
    """The program cannot be run on these tensors, though they fit its signature."""


class ArrayProgram(Protocol):
    """What a loaded file computes. `max_rows`: the largest first dimension it takes, if there is a bound."""

    @property
    def platform(self) -> str: ...
    @property
    def backend(self) -> str: ...
    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def max_rows(self) -> int | None: ...

    def run(self, inputs: Arrays) -> list[Array]:
        """One call, on a thread; raises `InvalidTensorsError`."""


class ArrayModel:
    """One loaded file. Requests are batched when the first dimension of every tensor is free."""

    device = "cpu"
    decoupled = False

    def __init__(self, name: str, version: str, path: Path, program: ArrayProgram) -> None:
        self.name = name
        self.version = version
        self.statistics = ModelStatistics()
        self.memory_bytes = path.stat().st_size
        self.platform, self.backend = program.platform, program.backend
        self.inputs, self.outputs = program.inputs, program.outputs
        self._is_batched = all(spec.shape and spec.shape[0] == -1 for spec in (*self.inputs, *self.outputs))
        most = MAX_ROWS if program.max_rows is None else min(MAX_ROWS, program.max_rows)
        self._batcher = DynamicBatcher(program.run, max_rows=most if self._is_batched else 1)

    @property
    def execution_count(self) -> int:
        """Calls of the model, each for one batch."""
        return self._batcher.num_calls

    async def infer(self, request: InferRequest, caller: Caller) -> AsyncGenerator[InferResponse, None]:
        """The single response; raises `ApiError`."""
        yield await self.infer_once(request, caller)

    async def infer_once(self, request: InferRequest, caller: Caller) -> InferResponse:
        """Run one request, together with others that arrive in time."""
        started = time.perf_counter_ns()
        try:
            arrays = self._arrays(request)
            wanted = [spec.name for spec in self.outputs] if not request.outputs else list(request.outputs)
            self._check_outputs(wanted)
            outputs = await self._submit(arrays)
        except ApiError:
            self.statistics.failed(time.perf_counter_ns() - started)
            raise
        self.statistics.succeeded(time.perf_counter_ns() - started)
        by_name = dict(zip((spec.name for spec in self.outputs), outputs, strict=True))
        specs = {spec.name: spec for spec in self.outputs}
        return InferResponse([_tensor(specs[name], by_name[name]) for name in wanted])

    def close(self) -> None:
        """Free the program once nobody uses it."""
        self._batcher.close()

    async def _submit(self, arrays: Arrays) -> list[Array]:
        try:
            return await self._batcher.submit(arrays)
        except InvalidTensorsError:
            raise bad_request(
                "inputs: the model cannot be run on tensors of these shapes or values", "inputs"
            ) from None
        except Exception as error:
            raise ApiError(500, INTERNAL_ERROR, reason="model_error") from error

    def _arrays(self, request: InferRequest) -> dict[str, Array]:
        specs = {spec.name: spec for spec in self.inputs}
        for name in request.inputs:
            if name not in specs:
                raise bad_request(f"inputs.{name[:40]}: unknown; this model takes {', '.join(specs)}", name[:40])
        arrays: dict[str, Array] = {}
        for name, spec in specs.items():
            if name not in request.inputs:
                raise bad_request(f"inputs.{name}: missing; this input is required", name)
            arrays[name] = _array(spec, request.inputs[name])
        rows = {len(array) for array in arrays.values() if array.ndim}
        if self._is_batched and len(rows) > 1:
            raise bad_request("inputs: the first dimension must be the same in every tensor", "inputs")
        return arrays

    def _check_outputs(self, names: Sequence[str]) -> None:
        known = [spec.name for spec in self.outputs]
        for name in names:
            if name not in known:
                raise bad_request(f"outputs.{name[:40]}: unknown; this model gives {', '.join(known)}", name[:40])


def _array(spec: TensorSpec, tensor: Tensor) -> Array:
    if tensor.datatype != spec.datatype:
        raise bad_request(f"inputs.{spec.name}: must be {spec.datatype}, got {tensor.datatype}", spec.name)
    fits = len(tensor.shape) == len(spec.shape) and all(
        wanted in (-1, given) for wanted, given in zip(spec.shape, tensor.shape, strict=True)
    )
    if not fits:
        raise bad_request(
            f"inputs.{spec.name}: must have shape {list(spec.shape)}, got {list(tensor.shape)}", spec.name
        )
    if spec.datatype == "BYTES":
        texts = [element.decode(errors="replace") for element in tensor.elements()]
        return np.asarray(texts, dtype=np.object_).reshape(tensor.shape)
    return tensor.numbers()


def _tensor(spec: TensorSpec, array: Array) -> Tensor:
    if spec.datatype == "BYTES":
        flat = [str(value).encode() for value in array.reshape(-1)]
        return Tensor(spec.name, "BYTES", array.shape, Tensor.of_bytes(spec.name, flat).data)
    return Tensor.of_numbers(spec.name, spec.datatype, array)
