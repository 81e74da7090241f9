"""What quantizing changed."""

from __future__ import annotations

import msgspec


class QuantizationReport(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in bytes of the weights as files; perplexities on text that was not calibrated on."""

    model: str
    output: str
    method: str
    scheme: str
    num_quantized: int
    num_in_8_bits: int  # of those, where the scheme has 4
    calibration_tokens: int
    evaluation_tokens: int
    weight_bytes_before: int
    weight_bytes_after: int
    perplexity_before: float
    perplexity_after: float
    perplexity_change_error: float | None  # two standard errors of `perplexity_change`; None: too little text to tell
    seconds: float
    peak_memory_bytes: int

    @property
    def perplexity_change(self) -> float:
        """Relative: 0.01 is one per cent worse."""
        return self.perplexity_after / self.perplexity_before - 1
