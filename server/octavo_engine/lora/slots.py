"""Which adapters are loaded, which of them lie in the device's slots, and who uses them. Pure bookkeeping."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from octavo_engine.errors import InvalidRequestError
from octavo_engine.lora.adapter import Adapter
from octavo_engine.messages import AdapterStats


@dataclass(slots=True, eq=False)
class LoadedAdapter:
    """num_sequences: that have not ended; num_running: those of them that run, and pin the slot."""

    adapter: Adapter
    slot: int | None = None
    num_sequences: int = 0
    num_running: int = 0
    leaving: bool = False


class AdapterSlots:
    """At most `max_loaded` adapters in host memory, `max_loras` of them in device slots at a time.

    A sequence runs only while its adapter has a slot. A slot that no running sequence needs is given to another
    adapter, the least recently used first. An adapter that is to leave takes no new sequences and is gone once the
    last one has ended.
    """

    def __init__(self, max_loras: int, max_loaded: int) -> None:
        self._max_loaded = max_loaded
        self._free = list(range(max_loras - 1, -1, -1))
        self._loaded: dict[str, LoadedAdapter] = {}
        self._resident: OrderedDict[str, LoadedAdapter] = OrderedDict()
        self._to_place: dict[int, Adapter] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._loaded

    def check_room(self, name: str) -> None:
        """Raise `InvalidRequestError` if an adapter of this name cannot be taken in."""
        if name in self._loaded:
            state = "is being unloaded" if self._loaded[name].leaving else "is loaded already"
            raise InvalidRequestError(f"lora_name: {name!r} {state}", "lora_name")
        if len(self._loaded) >= self._max_loaded:
            raise InvalidRequestError(
                f"lora_name: {self._max_loaded} adapters are loaded, which is the most; unload one first "
                "or raise max_cpu_loras",
                "lora_name",
            )

    def add(self, adapter: Adapter) -> None:
        """Take an adapter in; raises as `check_room`."""
        self.check_room(adapter.name)
        self._loaded[adapter.name] = LoadedAdapter(adapter)

    def find(self, name: str) -> LoadedAdapter:
        """The adapter for a new sequence; raises `InvalidRequestError` for one that is not loaded or about to leave."""
        loaded = self._loaded.get(name)
        if loaded is None or loaded.leaving:
            raise InvalidRequestError(f"model: adapter {name!r} is not loaded", "model")
        return loaded

    def retire(self, name: str) -> bool:
        """Let no new sequence use an adapter; True if it is gone at once. Raises `InvalidRequestError`."""
        loaded = self._loaded.get(name)
        if loaded is None:
            raise InvalidRequestError(f"lora_name: {name!r} is not loaded", "lora_name")
        loaded.leaving = True
        return self._remove_if_unused(loaded)

    def begin(self, loaded: LoadedAdapter) -> None:
        """A sequence that uses it came in."""
        loaded.num_sequences += 1

    def end(self, loaded: LoadedAdapter) -> bool:
        """Such a sequence ended; True if a leaving adapter is gone with it."""
        loaded.num_sequences -= 1
        return loaded.leaving and self._remove_if_unused(loaded)

    def pin(self, loaded: LoadedAdapter) -> int | None:
        """The slot for a sequence that starts to run, or None while running sequences need them all."""
        if loaded.slot is None and not self._take_slot(loaded):
            return None
        self._resident.move_to_end(loaded.adapter.name)
        loaded.num_running += 1
        return loaded.slot

    def unpin(self, loaded: LoadedAdapter) -> None:
        """Such a sequence does not run any more."""
        loaded.num_running -= 1

    def take_placements(self) -> list[tuple[int, Adapter]]:
        """(slot, adapter) that must be put there before the next step."""
        placements = list(self._to_place.items())
        self._to_place.clear()
        return placements

    def stats(self) -> list[AdapterStats]:
        return [
            AdapterStats(
                name=name,
                path=loaded.adapter.path,
                rank=loaded.adapter.rank,
                is_resident=loaded.slot is not None,
                is_leaving=loaded.leaving,
                num_running=loaded.num_running,
                num_waiting=loaded.num_sequences - loaded.num_running,
            )
            for name, loaded in self._loaded.items()
        ]

    def _take_slot(self, loaded: LoadedAdapter) -> bool:
        if not self._free:
            idle = next((other for other in self._resident.values() if not other.num_running), None)
            if idle is None:
                return False
            self._give_up_slot(idle)
        loaded.slot = self._free.pop()
        self._resident[loaded.adapter.name] = loaded
        self._to_place[loaded.slot] = loaded.adapter
        return True

    def _give_up_slot(self, loaded: LoadedAdapter) -> None:
        if loaded.slot is not None:
            del self._resident[loaded.adapter.name]
            self._to_place.pop(loaded.slot, None)
            self._free.append(loaded.slot)
            loaded.slot = None

    def _remove_if_unused(self, loaded: LoadedAdapter) -> bool:
        if loaded.num_sequences:
            return False
        self._give_up_slot(loaded)
        del self._loaded[loaded.adapter.name]
        return True
