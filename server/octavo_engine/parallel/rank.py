"""One rank's place in the topology: what it holds of a model and how it speaks with the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from octavo_engine.parallel.communicator import Communicator
from octavo_engine.parallel.sections import Section, share
from octavo_engine.parallel.topology import Topology, experts_of, heads_of

Reduce = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Rank:
    """What a model asks while it reads its weights and while it runs.

    tensor_group: the ranks of this stage, None where there is one. stage_group: the ranks of all stages with this
    tensor rank.
    """

    topology: Topology = field(default_factory=Topology)
    index: int = 0
    tensor_group: Communicator | None = None
    stage_group: Communicator | None = None

    @property
    def stage(self) -> int:
        return self.topology.place(self.index)[0]

    @property
    def tensor_rank(self) -> int:
        return self.topology.place(self.index)[1]

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.topology.pipeline - 1

    @property
    def reduce(self) -> Reduce | None:
        """Sums partial results over the tensor ranks; None where one rank holds all."""
        return None if self.tensor_group is None else self.tensor_group.reduce

    def share(self, size: int, unit: int = 1) -> Section:
        """This tensor rank's part of `size` rows or columns, in whole units."""
        return share(size, self.tensor_rank, self.topology.tensor, unit)

    def heads(self, num_heads: int, num_kv_heads: int) -> tuple[Section, Section]:
        """(query heads, key-value heads) of this rank."""
        return heads_of(num_heads, num_kv_heads, self.tensor_rank, self.topology.tensor)

    def experts(self, num_experts: int) -> Section:
        """The experts this rank computes, at least in part."""
        return experts_of(num_experts, self.topology, self.tensor_rank)

    def expert_width(self, size: int) -> Section:
        """This rank's part of each of its experts' width."""
        return Section(size, 0, size) if self.topology.expert else self.share(size)

    def layers(self, num_layers: int) -> range:
        """The layers of this stage."""
        return self.topology.layers(num_layers, self.stage)

    def gather_columns(self, x: torch.Tensor, total: int) -> torch.Tensor:
        """[n, held] -> [n, total] on the stage's first rank."""
        return x if self.tensor_group is None else self.tensor_group.gather_columns(x, total)

    def hand_on(self, x: torch.Tensor, residual: torch.Tensor) -> None:
        """Send the streams between two layers to the next stage."""
        if self.stage_group is not None:
            self.stage_group.send(torch.stack((x, residual)), self.stage + 1)

    def take_over(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The streams from the stage before. shape: [T, hidden_size]."""
        if self.stage_group is None:
            raise RuntimeError("a rank without stages takes nothing over")
        x, residual = self.stage_group.receive((2, *shape), dtype, device, self.stage - 1).unbind(0)
        return x, residual


SINGLE = Rank()
