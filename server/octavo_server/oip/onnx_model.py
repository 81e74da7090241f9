"""ONNX files on ONNX Runtime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo_engine.errors import ModelLoadError
from octavo_server.oip.array_model import InvalidTensorsError
from octavo_server.oip.dynamic_batcher import Array, Arrays
from octavo_server.oip.tensors import TensorSpec

if TYPE_CHECKING:
    import onnxruntime

_DATATYPES = {
    "float": "FP32", "double": "FP64", "float16": "FP16", "bool": "BOOL", "string": "BYTES",
    **{f"{sign}int{bits}": f"{sign}int{bits}".upper() for sign in ("", "u") for bits in (8, 16, 32, 64)},
}  # fmt: skip


class OnnxProgram:
    """One file, loaded."""

    platform = "onnxruntime_onnx"
    backend = "onnxruntime"
    max_rows: int | None = None

    def __init__(self, path: Path) -> None:
        """Raises `ModelLoadError`."""
        self._session = _open(path)
        self.inputs = tuple(_spec(tensor, path) for tensor in self._session.get_inputs())
        self.outputs = tuple(_spec(tensor, path) for tensor in self._session.get_outputs())

    def run(self, inputs: Arrays) -> list[Array]:
        """Raises `InvalidTensorsError`, or what ONNX Runtime raises."""
        try:
            outputs: list[Array] = self._session.run(None, dict(inputs))
        except Exception as error:  # onnxruntime raises many kinds, none with a common root
            if "INVALID_ARGUMENT" in str(error):
                raise InvalidTensorsError from error
            raise
        return outputs


def _open(path: Path) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelLoadError(f"{path}: ONNX models need onnxruntime: pip install 'octavo[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = max(1, (os.cpu_count() or 1) // 2)
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many kinds, none with a common root
        raise ModelLoadError(f"{path}: is no model that ONNX Runtime can load: {str(error)[:300]}") from error


def _spec(tensor: Any, path: Path) -> TensorSpec:
    kind = tensor.type.removeprefix("tensor(").removesuffix(")")
    if not tensor.type.startswith("tensor(") or kind not in _DATATYPES:
        raise ModelLoadError(
            f"{path}: {tensor.name} is of type {tensor.type}, and only plain tensors are served "
            "(scikit-learn: export with zipmap=False)"
        )
    shape = tuple(size if isinstance(size, int) else -1 for size in tensor.shape)
    return TensorSpec(tensor.name, _DATATYPES[kind], shape)
