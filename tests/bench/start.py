"""`make bench-start`: from the start of the inference service to its first token, warm and cold.

Warm: the model is converted and in the machine's file cache. Cold: the folder of models is empty. auth and
the gateway run already, and keep asking: the first token is what a waiting client would see.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from deploy.dev.environment import ROOT
from deploy.dev.ports import PortReservations
from services.inference.models import PACKAGED_MODEL_ID, ModelUnusable, open_packaged
from tests.bench import report
from tests.bench.figures import Aim, Spread, rounds_from
from tests.bench.progress import Progress
from tests.bench.subject import cpu_s
from tests.bench.through_gateway import Platform
from tests.bench.work import CannotMeasure, Work
from tests.framework import broker as brokers
from tests.framework.mesh import CannotStart, MeshHarness

EXIT_MEASURED, EXIT_COULD_NOT = 0, 2
WARM_AIM_S, COLD_AIM_S = 10.0, 30.0
TIMEOUT_S = 300.0
PREPARING = "preparing "


@dataclass(frozen=True, slots=True)
class Start:
    """One start; seconds since the process was started."""

    kind: str
    listening_s: float
    """Its health can be asked."""
    ready_s: float
    """Its health is SERVING."""
    first_token_s: float
    service_cpu_s: float
    engine_cpu_s: float
    """What both processes had used by then: on a machine that does other things too, the truer figure."""
    progress_lines: int
    """What the log said of the conversion."""


async def start(mesh: MeshHarness, platform: Platform, kind: str, models: Path) -> Start:
    """Starts inference, waits for a first token through the gateway, and stops it again."""
    mesh.configure("inference", backend=None, models_dir=models)
    before = mesh.log("inference").count(PREPARING)
    begun_s = time.monotonic()
    mesh.spawn("inference")
    channel = mesh.channel("inference")
    await asyncio.wait_for(channel.channel_ready(), TIMEOUT_S)
    listening_s = time.monotonic() - begun_s
    await mesh.wait_ready("inference", TIMEOUT_S)
    ready_s = time.monotonic() - begun_s
    while True:
        # The gateway has to see the replica first, as a client's retries have to.
        try:
            await platform.answer(Work(("The sky is blue because",), 1))
            break
        except* CannotMeasure as group:
            if time.monotonic() - begun_s > TIMEOUT_S:
                raise CannotMeasure(f"no token after {TIMEOUT_S:.0f} s: {group.exceptions[0]}") from group
            await asyncio.sleep(0.05)
    first_token_s = time.monotonic() - begun_s
    used = cpu_s(platform.processes())
    lines = mesh.log("inference").count(PREPARING) - before
    await mesh.stop("inference")
    return Start(kind, listening_s, ready_s, first_token_s, used["inference"], used["engine"], lines)


async def bench(rounds: int, models: Path, folder: Path, say: Progress) -> None:
    machine = report.machine()
    say(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_before'][0]}")
    reservations = PortReservations()
    broker = brokers.prepare(folder / "kafka", reservations)
    mesh = MeshHarness(folder / "mesh", broker, reservations)
    platform = Platform(mesh, PACKAGED_MODEL_ID)
    starts: list[Start] = []
    try:
        say("starting the broker, auth, logging and the gateway")
        broker.start()
        await broker.wait_ready()
        await mesh.start("auth", "logging", "gateway")
        for index in range(rounds):
            for kind, where in (("warm", models), ("cold", folder / f"models{index}")):
                made = await start(mesh, platform, kind, where)
                starts.append(made)
                say(
                    f"{kind}: ready after {made.ready_s:.1f} s, first token {made.first_token_s:.1f} s;"
                    f" CPU seconds: service {made.service_cpu_s:.1f}, engine {made.engine_cpu_s:.1f};"
                    f" {made.progress_lines} lines about the conversion"
                )
    finally:
        await mesh.close()
        if broker.process.running:
            broker.kill()
        broker.process.end_group()
        reservations.release()
    if not all(made.progress_lines for made in starts if made.kind == "cold"):
        raise CannotMeasure("a cold start did not say how far its conversion was")
    made_aims = [
        Aim(
            f"start_to_first_token_{kind}_s",
            Spread.of([made.first_token_s for made in starts if made.kind == kind]),
            target,
            at_most=True,
        )
        for kind, target in (("warm", WARM_AIM_S), ("cold", COLD_AIM_S))
    ]
    content = {
        "machine": machine,
        "starts": [asdict(made) for made in starts],
        "aims": [aim.line() for aim in made_aims],
    }
    say(f"raw rounds: {report.write('start', content).relative_to(ROOT)}")
    report.show([_table(starts)], made_aims)


def _table(starts: Sequence[Start]) -> Table:
    found = Table(title="Seconds from the start of inference (least..greatest)", title_justify="left")
    for column in ("start", "listening", "ready", "first token", "CPU: service", "CPU: engine"):
        found.add_column(column)
    for kind in dict.fromkeys(made.kind for made in starts):
        mine = [made for made in starts if made.kind == kind]
        found.add_row(
            kind,
            str(Spread.of([made.listening_s for made in mine])),
            str(Spread.of([made.ready_s for made in mine])),
            str(Spread.of([made.first_token_s for made in mine])),
            str(Spread.of([made.service_cpu_s for made in mine])),
            str(Spread.of([made.engine_cpu_s for made in mine])),
        )
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.start", description=__doc__)
    parser.add_argument("--rounds", type=rounds_from, default=5)
    rounds = parser.parse_args(argv).rounds
    models = Path(os.environ.get("LLMOS_MODELS_DIR") or ROOT / ".state" / "models")
    try:
        open_packaged(models, print)
        with tempfile.TemporaryDirectory(prefix="llmos-start-") as folder:
            asyncio.run(bench(rounds, models, Path(folder), Progress()))
    except (CannotMeasure, CannotStart, ModelUnusable) as error:
        print(f"Could not measure: {error}", file=sys.stderr)
        return EXIT_COULD_NOT
    return EXIT_MEASURED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
