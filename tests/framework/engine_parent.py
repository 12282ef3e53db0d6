"""A program that runs an engine until it is killed: `engine_parent.py MODEL_FOLDER loading|serving`.

Prints the pid of the engine's process, once it is loading or serving.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.framework.engines import START_TIMEOUT_S, embedded_engine
from tests.framework.waiting import eventually


async def main(model: Path, phase: str) -> None:
    engine = embedded_engine(model, "tiny")
    await engine.start()
    if phase == "serving":
        await engine.wait_healthy(START_TIMEOUT_S)
    else:
        # The child has said something, so it has asked to die with its parent.
        await eventually(lambda: "loading" in engine.health().detail and engine.child_pid)
        await eventually(lambda: engine.health().detail == "loading libraries", timeout_s=START_TIMEOUT_S)
    print(engine.child_pid, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
