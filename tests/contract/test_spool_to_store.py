"""The real spool, relay, consumer and store do what the model of their protocol does, step by step (R27)."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path

import pytest

from tests.framework.audit_model import ModelWorld
from tests.framework.audit_real_world import RealWorld
from tests.framework.audit_trace import Director

RUNS = 5


@pytest.mark.parametrize("run", range(RUNS))
@pytest.mark.parametrize("with_store_wipes", [False, True])
async def test_r27_the_real_parts_end_where_the_model_ends(
    run: int, with_store_wipes: bool, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(10**9) if run else 7
    print(f"seed {seed}")
    world, model = RealWorld(tmp_path), ModelWorld()
    await world.begin()
    real = Director(seed, world, with_store_wipes=with_store_wipes, steps=120)
    oracle = Director(seed, model, with_store_wipes=with_store_wipes, steps=120)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            await oracle.run()
        await real.run()
        assert real.log == oracle.log
        assert await world.records() == await model.records()
        assert sorted(await world.notes()) == sorted(await model.notes())
        assert sorted(await world.jobs()) == sorted(await model.jobs())
        assert await world.fenced() == await model.fenced()
        assert await world.settled_by_logging() == await model.settled_by_logging()
    except BaseException:
        print("\n".join(real.log))
        raise
    finally:
        await world.close()
