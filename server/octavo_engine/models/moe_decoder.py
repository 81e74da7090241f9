"""Decoders whose MLPs are mixtures of experts."""

from __future__ import annotations

from octavo_engine.layers.fused_moe import fuse
from octavo_engine.layers.mlp import GATED, GatedActivation, GatedMLP
from octavo_engine.layers.moe import MoE, SharedExpert
from octavo_engine.layers.routing import Routing
from octavo_engine.loader.weights import WeightLoader
from octavo_engine.models.config import LayerConfig, MoEConfig
from octavo_engine.models.decoder import MLP, Decoder
from octavo_engine.models.raw_config import RawConfig
from octavo_engine.parallel.sections import Section


class MoEDecoder(Decoder):
    """Reads a router and experts where a layer has them. `router_name` and `expert_names` (gate, up, down) are those
    of the family's files, under the layer's MLP. `moe_bias`: whether router and experts have biases."""

    router_name = "gate"
    expert_names = ("gate_proj", "up_proj", "down_proj")
    moe_bias = False

    def make_mlp(self, weights: WeightLoader, prefix: str, layer: LayerConfig) -> MLP:
        moe = layer.moe
        if moe is None:
            return super().make_mlp(weights, prefix, layer)
        router = {f"{prefix}.{self.router_name}": moe.num_experts}
        held = self.rank.experts(moe.num_experts)
        layer_moe = MoE(
            weights.linear(router, self.config.hidden_size, bias=self.moe_bias, exact=True),
            self.make_experts(weights, f"{prefix}.experts", moe, held),
            self._routing(weights, prefix, moe),
            self.make_shared_expert(weights, prefix),
            held.start,
            self.rank.reduce,
        )
        return layer_moe if weights.device.type == "cpu" else fuse(layer_moe)

    def _routing(self, weights: WeightLoader, prefix: str, moe: MoEConfig) -> Routing:
        name = f"{prefix}.{moe.correction_bias}"
        return Routing(
            moe.top_k,
            moe.renormalize,
            moe.sigmoid,
            moe.num_groups,
            moe.top_groups,
            moe.groups_by_best,
            moe.scale,
            weights.vector(name, moe.num_experts) if moe.correction_bias else None,
        )

    def make_experts(self, weights: WeightLoader, prefix: str, moe: MoEConfig, held: Section) -> tuple[GatedMLP, ...]:
        """This rank's experts, or its part of each."""
        for index in (*range(held.start), *range(held.stop, moe.num_experts)):
            weights.leave(f"{prefix}.{index}.")
        width = self.rank.expert_width(moe.intermediate_size)
        return tuple(self.make_expert(weights, f"{prefix}.{index}", width) for index in range(held.start, held.stop))

    def make_expert(self, weights: WeightLoader, prefix: str, width: Section) -> GatedMLP:
        gate, up, down = (f"{prefix}.{name}" for name in self.expert_names)
        hidden = self.config.hidden_size
        return GatedMLP(
            weights.linear({gate: (width,), up: (width,)}, hidden, bias=self.moe_bias),
            weights.linear({down: hidden}, width, bias=self.moe_bias, reduce=False),
            self.expert_activation(),
        )

    def expert_activation(self) -> GatedActivation:
        return GATED[self.config.activation]

    def make_shared_expert(self, weights: WeightLoader, prefix: str) -> SharedExpert | GatedMLP | None:
        return None


def moe_config(raw: RawConfig, size_key: str, *, renormalize: bool) -> MoEConfig:
    """Numbers of experts under the two names in use. size_key: the field with an expert's width."""
    count = raw.integer("num_local_experts", raw.integer("num_experts", 0, low=0), high=4096)
    top_k = raw.integer("num_experts_per_tok", high=count)
    return MoEConfig(count, top_k, raw.integer(size_key), renormalize)
