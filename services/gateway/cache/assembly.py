"""Puts the response cache together for the composition root."""

from __future__ import annotations

from services.gateway.cache.answers import AnswerCache
from services.gateway.cache.memory import MemoryCache
from services.gateway.cache.ports import ResponseCache
from services.gateway.cache.redis_cache import RedisCache
from services.gateway.redis import Redis
from services.gateway.routing import Router
from services.gateway.settings import GatewaySettings
from services.mesh.clock import Clock


def answer_cache(settings: GatewaySettings, redis: Redis | None, router: Router, clock: Clock) -> AnswerCache:
    """In Redis where there is one, else in memory, unless it is switched off."""
    kept: ResponseCache | None = None
    max_bytes, max_entry_bytes = settings.cache_max_bytes, settings.cache_max_entry_bytes
    ttl_s = settings.cache_ttl_s
    if max_bytes and redis is not None:
        kept = RedisCache(redis, max_entry_bytes=max_entry_bytes, ttl_s=ttl_s)
    elif max_bytes:
        kept = MemoryCache(clock, max_bytes=max_bytes, max_entry_bytes=max_entry_bytes, ttl_s=ttl_s)
    return AnswerCache(kept, router, clock, max_flight_bytes=max_bytes)
