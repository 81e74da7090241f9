"""Follows what replicas tell of their prefix caches, so that routing knows what they hold rather than what was sent."""

from octavo_gateway.cache_events.following import CacheFollower

__all__ = ["CacheFollower"]
