"""The memory of a replica: blocks on the device, and below them host memory if there is some."""

from __future__ import annotations

from octavo_engine.config import EngineConfig
from octavo_engine.kv.block_manager import BlockManager
from octavo_engine.kv.block_pool import BlockPool
from octavo_engine.kv.events import MEDIUM_DEVICE, MEDIUM_HOST, KVEventLog
from octavo_engine.kv.host_tier import HostTier
from octavo_engine.messages import ModelInfo


def block_manager(config: EngineConfig, model: ModelInfo, block_size: int, events: KVEventLog | None) -> BlockManager:
    """Both tiers under the same rules: one cache policy, one share for each tenant, one event log."""

    def pool(num_blocks: int, medium: str) -> BlockPool:
        return BlockPool(
            num_blocks,
            block_size,
            enable_caching=config.enable_prefix_caching,
            tenant_quota=config.prefix_cache_tenant_share,
            events=events,
            medium=medium,
        )

    host = HostTier(pool(model.kv_host_blocks, MEDIUM_HOST)) if model.kv_host_blocks else None
    return BlockManager(pool(model.kv_blocks_total, MEDIUM_DEVICE), host)
