"""The runtimes that Octavo brings along, as ClusterServingRuntime manifests."""

from __future__ import annotations

from functools import cache
from importlib import resources

import yaml

from octavo_operator.api.serving_runtime import ClusterServingRuntime
from octavo_operator.api.validation import parse


@cache
def preset(name: str) -> ClusterServingRuntime:
    """The built-in runtime of this name. Raises KeyError, which names the known ones."""
    if name not in preset_names():
        raise KeyError(f"no built-in runtime {name!r}; there are {', '.join(preset_names())}")
    text = resources.files(__name__).joinpath(f"{name}.yaml").read_text()
    return parse(ClusterServingRuntime, yaml.safe_load(text))


@cache
def preset_names() -> tuple[str, ...]:
    """Names of the built-in runtimes."""
    files = (entry.name for entry in resources.files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml")))
