"""What is noted during a soak: each process's memory, descriptors and threads, and what services count."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tests.framework.mesh import MeshHarness

METRICS = {
    "inference": (
        "llmos_engine_sequences_running",
        "llmos_engine_sequences_waiting",
        "llmos_engine_kv_pages_used",
        "llmos_engine_restarts_total",
        "llmos_engine_preemptions_total",
        "llmos_calls_running",
    ),
    "gateway": ("llmos_calls_running",),
}
AT_REST = tuple(
    f"{service} {metric}"
    for service, metrics in METRICS.items()
    for metric in metrics
    if not metric.endswith("_total")
)
"""Those that are 0 when nothing runs."""
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment."""

    time_s: float
    """Since the load began."""
    values: Mapping[str, float]
    """`gateway rss_mib`, `engine descriptors`, `inference llmos_calls_running`, …"""


class Sampler:
    """Looks at a mesh."""

    def __init__(self, mesh: MeshHarness) -> None:
        self._mesh = mesh
        self._begun_s = time.monotonic()
        self._client = httpx.AsyncClient(timeout=10, trust_env=False)
        self.samples: list[Sample] = []

    async def take(self, more: Mapping[str, float]) -> Sample:
        """A sample; `more` is added to it."""
        values = dict(more)
        for name, process in self.processes().items():
            with process.oneshot():
                values[f"{name} rss_mib"] = process.memory_info().rss / MIB
                values[f"{name} descriptors"] = process.num_fds()
                values[f"{name} threads"] = process.num_threads()
        for service in METRICS:
            values |= await self.metrics(service)
        sample = Sample(time.monotonic() - self._begun_s, values)
        self.samples.append(sample)
        return sample

    def processes(self) -> dict[str, psutil.Process]:
        """Ours; the broker's memory is its own affair."""
        found = {name: psutil.Process(process.pid) for name, process in self._mesh.processes.items()}
        for index, child in enumerate(self._mesh.children("inference")):
            found[f"engine{index or ''}"] = child
        return found

    async def metrics(self, service: str) -> dict[str, float]:
        """The sums over all labels; 0 where nothing was recorded yet. Watches do not count."""
        text = (await self._client.get(self._mesh.metrics_url(service))).text
        found = dict.fromkeys(METRICS[service], 0.0)
        for line in text.splitlines():
            name = line.partition("{")[0].partition(" ")[0]
            if name in found and "/Watch" not in line:
                found[name] += float(line.rsplit(" ", 1)[1])
        return {f"{service} {name}": value for name, value in found.items()}

    async def close(self) -> None:
        await self._client.aclose()


def write_csv(path: Path, samples: Sequence[Sample]) -> None:
    """A row for each sample, ready to be plotted."""
    names = list(dict.fromkeys(name for sample in samples for name in sample.values))
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["time_s", *names])
        for sample in samples:
            row = [sample.values.get(name, "") for name in names]
            writer.writerow([f"{sample.time_s:.2f}", *(f"{v:.2f}" if v != "" else "" for v in row)])
