"""What configurations say of sequence-classification heads."""

from __future__ import annotations

import torch

from octavo_engine.layers.classifier import Step
from octavo_engine.models.raw_config import RawConfig

SUFFIX = "ForSequenceClassification"
_MAX_LABELS = 10_000


def labels(raw: RawConfig) -> tuple[str, ...]:
    """Names of the labels, in the order of the head's outputs; two without names where the file says nothing."""
    named = raw.section("id2label")
    count = raw.integer("num_labels", len(named.values) if named is not None else 2, high=_MAX_LABELS)
    names = [f"LABEL_{index}" for index in range(count)]
    if named is not None:
        if set(named.values) != {str(index) for index in range(count)}:
            raise raw.wrong("id2label", f"names for the numbers 0 to {count - 1}")
        names = [named.text(str(index)) for index in range(count)]
    return tuple(names)


def activation(raw: RawConfig) -> Step:
    """Sigmoid for one label or several that exclude nothing, softmax for one of many, nothing for regression.

    sentence-transformers' own setting for cross-encoders wins where there is one.
    """
    section = raw.section("sentence_transformers") or RawConfig({}, raw.origin)
    key = "sbert_ce_default_activation_function"
    chosen = section.text("activation_fn", raw.text(key, "")).rpartition(".")[2]
    known: dict[str, Step] = {"Sigmoid": torch.sigmoid, "Identity": _identity}
    if chosen:
        if chosen not in known:
            raise raw.wrong(key, "torch.nn.modules.activation.Sigmoid or torch.nn.modules.linear.Identity")
        return known[chosen]
    kind = raw.text("problem_type", "")
    if kind == "regression":
        return _identity
    return torch.sigmoid if kind == "multi_label_classification" or len(labels(raw)) == 1 else _softmax


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _softmax(x: torch.Tensor) -> torch.Tensor:
    return x.softmax(-1)
