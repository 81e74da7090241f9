"""How near a step comes to what the device could do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo_engine.messages import ModelInfo
from octavo_engine.scheduler.step_time import StepLoad

_WEIGHT = 0.05
_BUFFER_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
_MATRIX = {"cpu": 1_024, "cuda": 8_192}
_REPEATS = 3


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What the device reaches at best, as measured: memory traffic and arithmetic."""

    bytes_per_s: float
    flops_per_s: float


class Roofline:
    """Achieved share of the limit, a running mean for steps that only decode and for those that prefill too.

    The limit of a step is the longer of two times: reading once what it needs of the weights and the decodes' keys and
    values; and its arithmetic, two operations for each parameter that a token passes and four for each pair of query
    and key element. The head works only for positions whose logits are wanted, and of a mixture's experts a token
    passes a few while a batch reads those that any of its tokens is sent to, by a router that sends evenly.
    """

    def __init__(self, model: ModelInfo, limits: DeviceLimits) -> None:
        self.decode = 0.0
        self.prefill = 0.0
        self._model = model
        self._limits = limits

    def observe(self, load: StepLoad, num_logits: int, seconds: float) -> None:
        """Take in a step; `prefill_pairs` above 0 marks one that prefills."""
        if seconds <= 0.0:
            return
        share = self.ideal_seconds(load, num_logits) / seconds
        if load.prefill_pairs:
            self.prefill = share if not self.prefill else self.prefill + _WEIGHT * (share - self.prefill)
        else:
            self.decode = share if not self.decode else self.decode + _WEIGHT * (share - self.decode)

    def ideal_seconds(self, load: StepLoad, num_logits: int) -> float:
        """What the step would take at the device's limit."""
        model = self._model
        experts = model.expert_parameters
        read = 1.0 - (1.0 - model.expert_share) ** load.num_tokens
        weight_bytes = model.weight_bytes * (1.0 - (1.0 - read) * experts / max(1, model.num_parameters))
        num_bytes = weight_bytes + load.decode_context * model.kv_bytes_per_token
        always = model.num_parameters - model.head_parameters - experts
        passed = (always + model.expert_share * experts) * load.num_tokens + model.head_parameters * num_logits
        pairs = load.prefill_pairs + load.decode_context
        operations = 2.0 * passed + model.attention_operations * pairs
        return max(num_bytes / self._limits.bytes_per_s, operations / self._limits.flops_per_s)


def measure_limits(model: ModelInfo) -> DeviceLimits:
    """Measure the device for some tens of milliseconds: passing over a large buffer, and a square product in the type
    that the model is multiplied in, which for quantized weights on a CPU is int8 unless activations stay in float32."""
    device = torch.device(model.device)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(model.dtype, torch.float32)
    buffer = torch.ones(_BUFFER_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    size = _MATRIX[device.type]
    in_int8 = device.type == "cpu" and model.quantization != "none" and dtype is not torch.float32
    matrix = torch.ones((size, size), dtype=torch.int8 if in_int8 else dtype, device=device)
    multiply = torch._int_mm if in_int8 else torch.mm
    pass_s = _best_seconds(lambda: buffer.mul_(1.0), device)  # in place: half the memory of a copy
    product_s = _best_seconds(lambda: multiply(matrix, matrix), device)
    return DeviceLimits(2 * buffer.nbytes / pass_s, 2.0 * size**3 / product_s)


def _best_seconds(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    best = float("inf")
    for _ in range(_REPEATS + 1):  # the first run also warms up
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return max(best, 1e-9)
