"""Architecture name in a checkpoint -> the class that runs it."""

from __future__ import annotations

from octavo_engine.errors import ModelLoadError
from octavo_engine.models.decoder import Decoder
from octavo_engine.models.llama import LlamaForCausalLM
from octavo_engine.models.raw_config import RawConfig

ARCHITECTURES: dict[str, type[Decoder]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
}


def find_architecture(raw: RawConfig) -> tuple[str, type[Decoder]]:
    """(name, class) of the first architecture the configuration names that is known here."""
    names = raw.texts("architectures", ())
    for name in names:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    found = ", ".join(names) if names else "none named"
    raise ModelLoadError(
        f"{raw.origin}: architectures {found}: not supported; known are {', '.join(sorted(ARCHITECTURES))}"
    )
