"""The table for people, the aims for scripts, the raw rounds as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from deploy.dev.environment import ROOT
from tests.bench.figures import Aim, Spread, ratio
from tests.bench.rounds import Rounds

RESULTS = ROOT / "bench-results"
"""Ignored by git."""
BASE = "platform"
_WIDTH = 120


def machine() -> dict[str, Any]:
    """The class of machine, and what runs on it."""
    model = platform.processor() or platform.machine()
    flags: set[str] = set()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            elif name.strip() == "flags":
                flags = set(value.split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    names = ("torch", "transformers", "grpcio", "numpy")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": [name for name in wanted if name in flags],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write(name: str, content: Mapping[str, Any]) -> Path:
    """Into the results' folder, under the time; returns where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps(content, indent=1))
    return path


def raw(rounds: Rounds) -> list[dict[str, Any]]:
    """Each batch of each round."""
    return [
        {
            "streams": level,
            "subject": subject,
            "round": index,
            "tokens_per_s": batch.tokens_per_s,
            "ttft_mean_s": batch.ttft_mean_s,
            "ttft_worst_s": batch.ttft_worst_s,
            "cpu_s": batch.cpu_s,
            "stolen": batch.stolen,
            "each": [
                {name: value for name, value in asdict(stream).items() if name not in ("token_ids", "text")}
                for stream in batch.streams
            ],
        }
        for level, by_subject in rounds.batches.items()
        for subject, batches in by_subject.items()
        for index, batch in enumerate(batches)
    ]


def table(rounds: Rounds) -> Table:
    found = Table(title="Medians of the rounds (least..greatest)", title_justify="left")
    columns = ("streams", "subject", "tokens/s", f"{BASE} / it", "first token, ms: mean", "worst")
    for column in columns:
        found.add_column(column, justify="left" if column == "subject" else "right")
    for level, by_subject in rounds.batches.items():
        for subject, batches in by_subject.items():
            rates = rounds.rates(level, subject)
            base = rounds.rates(level, BASE)
            found.add_row(
                str(level),
                subject,
                str(Spread.of(rates)),
                str(ratio(base, rates)) if base and subject != BASE else "",
                str(Spread.of([batch.ttft_mean_s * 1000 for batch in batches])),
                str(Spread.of([batch.ttft_worst_s * 1000 for batch in batches])),
            )
        found.add_section()
    return found


def disturbance(rounds: Rounds) -> str:
    """A sentence about who else had the machine."""
    shares = [batch.stolen for each in rounds.batches.values() for found in each.values() for batch in found]
    return f"A hypervisor gave others {100 * max(shares, default=0):.0f} % of the cores' time at most."


def cpu_table(rounds: Rounds) -> Table:
    """A row for each level and subject, a column for each process that works for any of them."""
    every = [batches for by_subject in rounds.batches.values() for batches in by_subject.values()]
    names = list(dict.fromkeys(name for batches in every for name in batches[0].cpu_s))
    found = Table(title="CPU seconds for 1,000 tokens, by process (medians)", title_justify="left")
    for column in ("streams", "subject", *names):
        found.add_column(column, justify="left" if column == "subject" else "right")
    for level, by_subject in rounds.batches.items():
        for subject, batches in by_subject.items():
            figures = [
                Spread.of([1000 * batch.cpu_s[name] / batch.tokens for batch in batches]).median
                if name in batches[0].cpu_s
                else None
                for name in names
            ]
            found.add_row(
                str(level), subject, *("" if value is None else f"{value:.2f}" for value in figures)
            )
        found.add_section()
    return found


def show(tables: Sequence[Table], aims: Sequence[Aim], spread: str = "least..greatest") -> None:
    """The tables, then a line for each aim."""
    console = Console(width=None if Console().is_terminal else _WIDTH)
    for each in tables:
        console.print(each)
    spreads = Table("aim", f"measured ({spread})", "target", "", title="Aims", title_justify="left")
    for aim in aims:
        bound = "at most" if aim.at_most else "at least"
        spreads.add_row(aim.name, str(aim.measured), f"{bound} {aim.target:g}", "met" if aim.met else "short")
    console.print(spreads)
    for aim in aims:
        print(aim.line(), flush=True)
