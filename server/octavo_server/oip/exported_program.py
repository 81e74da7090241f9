"""Run an exported program: its graph of ATen operations, one after the other, and no code from the file."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo_engine.errors import ModelLoadError
from octavo_server.oip.array_model import InvalidTensorsError
from octavo_server.oip.dynamic_batcher import Array, Arrays
from octavo_server.oip.exported_archive import DTYPES, ExportedArchive, read_archive
from octavo_server.oip.tensors import TensorSpec

_DATATYPES = {
    torch.uint8: "UINT8", torch.int8: "INT8", torch.int16: "INT16", torch.int32: "INT32", torch.int64: "INT64",
    torch.float16: "FP16", torch.float32: "FP32", torch.float64: "FP64", torch.bool: "BOOL",
}  # fmt: skip
_MEMORY_FORMATS = {
    1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d, 4: torch.preserve_format,
}  # fmt: skip
_ATEN = re.compile(r"torch\.ops\.aten\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)")
_FORBIDDEN = frozenset({"from_file", "_print"})  # reach files and the terminal
_ON_NUMBERS: dict[str, Callable[..., Any]] = {  # sizes are computed with these
    **{f"_operator.{name}": getattr(operator, name) for name in
       ("add", "sub", "mul", "floordiv", "mod", "truediv", "neg", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_")},
    "torch.sym_max": max, "torch.sym_min": min, "torch.sym_not": operator.not_, "torch.sym_float": float,
}  # fmt: skip
_AS_THEY_ARE = frozenset({
    "as_int", "as_ints", "as_bool", "as_bools", "as_string", "as_strings", "as_int_lists",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Ref:
    """A value that an earlier operation makes."""

    name: str


@dataclass(frozen=True, slots=True)
class _Step:
    """One operation. outputs: names, lists of names, or None for what nobody reads."""

    run: Callable[..., Any]
    positional: tuple[Any, ...]
    keywords: Mapping[str, Any]
    outputs: tuple[Any, ...]


class ExportedProgram:
    """One file, loaded; every output is called `OUTPUT__0` and so on, as Triton calls those of PyTorch models."""

    platform = "pytorch_exported_program"
    backend = "pytorch"

    def __init__(self, path: Path) -> None:
        """Raises `ModelLoadError`."""
        archive = read_archive(path)
        try:
            self._load(archive)
        except ModelLoadError as error:
            raise ModelLoadError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ModelLoadError(f"{path}: the graph is damaged: {type(error).__name__}: {str(error)[:200]}") from error

    def _load(self, archive: ExportedArchive) -> None:
        graph = archive.graph
        self._constants: dict[str, torch.Tensor] = {}
        arguments = [self._argument(spec, archive) for spec in archive.signature["input_specs"]]
        results = [_result(spec) for spec in archive.signature["output_specs"]]
        self._arguments = [name for name in arguments if name is not None]
        self._results = [name for name in results if name is not None]
        self._steps = [_step(node) for node in graph["nodes"]]
        _check_stateless(self._steps, set(self._constants))
        values = graph["tensor_values"]
        self.inputs = tuple(_spec(name, values[name]) for name in self._arguments)
        self.outputs = tuple(_spec(f"OUTPUT__{i}", values[name]) for i, name in enumerate(self._results))
        self.max_rows = _max_rows([values[name] for name in self._arguments], archive.ranges)

    def _argument(self, spec: Mapping[str, Any], archive: ExportedArchive) -> str | None:
        """The name of an input that callers give; parameters and the like are bound here."""
        ((kind, value),) = spec.items()
        if kind == "user_input":
            if "as_tensor" in value["arg"]:
                return str(value["arg"]["as_tensor"]["name"])
            raise ModelLoadError(f"takes an input that is no tensor ({next(iter(value['arg']))})")
        own_name = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
        if kind in own_name:
            self._constants[value["arg"]["name"]] = archive.tensors[value[own_name[kind]]]
        elif kind != "constant_input":
            raise ModelLoadError(f"takes an input of kind {kind[:40]}, which is not supported")
        return None

    @torch.inference_mode()
    def run(self, inputs: Arrays) -> list[Array]:
        """Raises `InvalidTensorsError` where an operation refuses its operands."""
        values: dict[str, Any] = dict(self._constants)
        for name in self._arguments:
            values[name] = torch.from_numpy(inputs[name].copy())
        try:
            for step in self._steps:
                arguments = [_resolved(argument, values) for argument in step.positional]
                keywords = {name: _resolved(argument, values) for name, argument in step.keywords.items()}
                _bind(step.outputs, step.run(*arguments, **keywords), values)
        except (RuntimeError, IndexError, ValueError) as error:
            raise InvalidTensorsError from error
        return [values[name].numpy() for name in self._results]


def _step(node: Mapping[str, Any]) -> _Step:
    target: str = node["target"]
    for item in node["inputs"]:
        if item["name"] in ("train", "training") and item["arg"].get("as_bool"):
            raise ModelLoadError("was exported while training; call eval() on the model before torch.export.export")
    by_keyword = {item["name"]: _value(item["arg"]) for item in node["inputs"] if item.get("kind") == 2}
    positional = tuple(_value(item["arg"]) for item in node["inputs"] if item.get("kind") != 2)
    return _Step(_operation(target), positional, by_keyword, tuple(_names(item) for item in node["outputs"]))


def _check_stateless(steps: Sequence[_Step], kept: set[str]) -> None:
    """Raise `ModelLoadError` if an operation writes to what is kept between calls, or to a view of it."""
    for step in steps:
        schema = step.run._schema if isinstance(step.run, torch._ops.OpOverload) else None
        if schema is None:
            continue
        by_name = dict(zip((argument.name for argument in schema.arguments), step.positional, strict=False))
        touched = {**by_name, **step.keywords}
        for argument in schema.arguments:
            value = touched.get(argument.name)
            if argument.alias_info is None or not isinstance(value, _Ref) or value.name not in kept:
                continue
            if argument.alias_info.is_write:
                raise ModelLoadError(f"{schema.name} changes {value.name[:60]}: the program keeps state between calls")
            kept |= {name for names in step.outputs for name in (names if isinstance(names, list) else [names]) if name}


def _operation(target: str) -> Callable[..., Any]:
    if target in _ON_NUMBERS:
        return _ON_NUMBERS[target]
    found = _ATEN.fullmatch(target)
    if found is None or found[1] in _FORBIDDEN:
        raise ModelLoadError(f"uses the operation {target[:80]!r}; only ATen's are run")
    try:
        operation: Callable[..., Any] = getattr(getattr(torch.ops.aten, found[1]), found[2])
    except AttributeError:
        raise ModelLoadError(f"uses {target[:80]!r}, which this torch does not know") from None
    if not isinstance(operation, torch._ops.OpOverload):
        raise ModelLoadError(f"uses {target[:80]!r}, which is no operation")
    return operation


def _value(argument: Mapping[str, Any]) -> Any:
    """An operand: a constant, or a `_Ref` to one."""
    ((kind, value),) = argument.items()
    if kind in _AS_THEY_ARE:
        return value
    match kind:
        case "as_none":
            return None
        case "as_float":
            return float(value)
        case "as_floats":
            return [float(item) for item in value]
        case "as_tensor":
            return _Ref(value["name"])
        case "as_tensors":
            return [_Ref(item["name"]) for item in value]
        case "as_optional_tensor":
            return _value(value)
        case "as_optional_tensors":
            return [_value(item) for item in value]
        case "as_sym_int" | "as_sym_bool" | "as_sym_float":
            return _number(value)
        case "as_sym_ints" | "as_sym_bools" | "as_sym_floats":
            return [_number(item) for item in value]
        case "as_scalar_type":
            return DTYPES[value]
        case "as_memory_format":
            return _MEMORY_FORMATS[value]
        case "as_layout" if value == 7:
            return torch.strided
        case "as_device" if value["type"] == "cpu":
            return torch.device("cpu")
        case "as_device":
            raise ModelLoadError(f"was exported for {value['type'][:20]!r}; export it on a CPU")
    raise ModelLoadError(f"uses an operand of kind {kind[:40]}, which is not supported")


def _number(argument: Mapping[str, Any]) -> Any:
    ((kind, value),) = argument.items()
    return _Ref(value) if kind == "as_name" else value


def _names(output: Mapping[str, Any]) -> Any:
    ((kind, value),) = output.items()
    if kind in ("as_tensor", "as_optional_tensor"):
        return value.get("name") if kind == "as_tensor" else value.get("as_tensor", {}).get("name")
    if kind == "as_tensors":
        return [item["name"] for item in value]
    if kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
        return value.get("as_name")
    if kind == "as_none":
        return None
    raise ModelLoadError(f"makes an output of kind {kind[:40]}, which is not supported")


def _result(spec: Mapping[str, Any]) -> str | None:
    ((kind, value),) = spec.items()
    if kind == "user_output" and "as_tensor" in value["arg"]:
        return str(value["arg"]["as_tensor"]["name"])
    if kind == "user_output" and "as_none" in value["arg"]:
        return None
    raise ModelLoadError(f"has an output of kind {kind[:40]} that is no tensor, or keeps state between calls")


def _resolved(argument: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(argument, _Ref):
        return values[argument.name]
    return [_resolved(item, values) for item in argument] if isinstance(argument, list) else argument


def _bind(outputs: Sequence[Any], results: Any, values: dict[str, Any]) -> None:
    for names, result in zip(outputs, [results] if len(outputs) == 1 else results or [], strict=False):
        if isinstance(names, list):
            values.update(zip(names, result, strict=True))
        elif names is not None:
            values[names] = result


def _spec(name: str, meta: Mapping[str, Any]) -> TensorSpec:
    dtype = DTYPES.get(meta["dtype"])
    if dtype not in _DATATYPES:
        raise ModelLoadError(f"{name[:60]} is of a type that the protocol has no name for")
    return TensorSpec(name, _DATATYPES[dtype], tuple(size.get("as_int", -1) for size in meta["sizes"]))


def _max_rows(metas: Sequence[Mapping[str, Any]], ranges: Mapping[str, Any]) -> int | None:
    """The bound that was exported for the first dimension, if there is one."""
    first = [meta["sizes"][0] for meta in metas if meta["sizes"]]
    symbols = {size["as_expr"]["expr_str"] for size in first if "as_expr" in size}
    bounds = [ranges[symbol].get("max_val") for symbol in symbols if symbol in ranges]
    return min((bound for bound in bounds if isinstance(bound, int)), default=None)
