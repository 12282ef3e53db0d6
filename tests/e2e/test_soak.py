"""Twenty seconds of the soak: every request ends once, nothing is left. `make soak` takes twenty minutes."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from deploy.dev.broker import Broker
from tests.bench.soak import configure, show, soak
from tests.bench.soak_judgement import Bounds
from tests.conftest import MeshFactory
from tests.framework.models import TINY_MODEL_ID, make_tiny_model

SECONDS = 15
# So short a time is all warm-up: only what is grossly wrong is seen in memory.
BOUNDS = Bounds(warm_up=0.4, growth_mib=60, peak=1.5)


@pytest.mark.slow
async def test_a_short_soak(make_mesh: MeshFactory, broker: Broker, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    model = await asyncio.to_thread(make_tiny_model, tmp_path / TINY_MODEL_ID)
    mesh = make_mesh(broker)
    configure(mesh, model)
    await mesh.start()
    verdict = await soak(mesh, TINY_MODEL_ID, seconds=SECONDS, every_s=1, seed=seed, say=print, bounds=BOUNDS)
    show(verdict)
    assert not verdict.complaints
    assert len(verdict.load.ended) >= 24
    assert len(verdict.outcomes) > 0
