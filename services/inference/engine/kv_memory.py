"""How many pages of keys and values fit: a share of the memory that this process really has."""

from __future__ import annotations

import os
from pathlib import Path

from services.inference.engine.kv_cache import pages_for

_SHARE = 0.5
"""Of what is available when the model has been loaded; the rest is for everything else on the machine."""
_CGROUP = Path("/sys/fs/cgroup")


def pool_pages(page_bytes: int, *, max_running: int, context_tokens: int, max_bytes: int) -> int:
    """Pages for the pool, at least one.

    `max_bytes`: what the deployment allows; 0 takes half of what is available. Never more than `max_running`
    sequences of the whole context need.
    """
    wanted = max_running * pages_for(context_tokens)
    allowed = (max_bytes or int(_SHARE * available_bytes())) // page_bytes
    return max(1, min(wanted, allowed))


def available_bytes(cgroup: Path = _CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory that can still be had: the machine's, or what the process's cgroup leaves of its limit."""
    free = [_machine_bytes(meminfo)]
    # A container sees its own cgroup as the root of this tree (v2, then v1).
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free.append(int((cgroup / limit).read_text()) - int((cgroup / usage).read_text()))
        except (OSError, ValueError):
            continue  # No such file, or `max`: no limit.
    return max(0, min(free))


def _machine_bytes(meminfo: Path) -> int:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
