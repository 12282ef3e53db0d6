"""transformers' `generate` with static batches."""

from __future__ import annotations

from pathlib import Path

from tests.bench.piped import Piped

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


class Generate(Piped):
    """A `Subject`."""

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        command = ("-m", "tests.bench.generate_worker", str(folder), dtype, device)
        super().__init__("generate", command, OFFLINE)
