"""What the inference service is told, by variables that begin with `LLMOS_INFERENCE_`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from services.inference.models import PACKAGED_MODEL_ID
from services.mesh.settings import Port, PositiveSeconds, ServiceSettings


class InferenceSettings(ServiceSettings):
    """Settings of the inference service."""

    model_config = SettingsConfigDict(
        env_prefix="LLMOS_INFERENCE_",
        frozen=True,
        extra="forbid",
        env_ignore_empty=True,
        protected_namespaces=(),
    )
    service: ClassVar[str] = "inference"

    grpc_port: Port = 50052
    metrics_port: Port = 51052
    state_dir: Path = Path(".state/inference")
    service_secret_file: Path = Path()
    """This service's own client secret; whatever serves needs one."""

    backend: Literal["embedded", "echo"] = "embedded"
    """`embedded` runs a model in a child process; `echo` says the prompt's words again, for tests."""
    models_dir: Path | None = None
    """Where converted models are kept; not set: `models` beside `state_dir`. May be shared."""
    model_path: Path | None = None
    """A folder of safetensors to serve; not set: the packaged model."""
    model_id: str = Field(default="", max_length=128, pattern=r"^[A-Za-z0-9._/-]*$")
    """What requests call the model; empty: the packaged model's id, or the name of `model_path`."""
    dtype: Literal["auto", "stored", "bfloat16", "float32"] = "auto"
    """Of the weights. `stored` computes with what the folder holds, quantised blocks included, on a CPU with
    the native step; `auto` is that for folders with blocks, else bfloat16, and float32 where torch computes
    on a CPU without AVX-512. float32 gives the tokens of transformers' own `generate`."""
    kernels: Literal["auto", "native", "torch"] = "auto"
    """What computes a step: on a CPU `auto` is the native library, built with the machine's C compiler on
    first use, and torch where that cannot be had."""
    instruction_set: Literal["auto", "avx512", "avx2", "portable"] = "auto"
    """Of the native library: `auto` is the best that the processor has."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is CUDA where there is one."""
    threads: int = Field(default=0, ge=0, le=1024)
    """For a step; 0 takes all cores that the process may use."""

    max_running: int = Field(default=16, ge=1, le=4096)
    """Sequences that run at once; a request with n choices counts n."""
    max_waiting: int = Field(default=64, ge=0, le=65_536)
    """Sequences that wait for a slot; more are refused at once."""
    max_output_tokens: int = Field(default=4096, ge=1)
    """The most that a choice may have, whatever the request asks for."""
    max_prefill_tokens: int = Field(default=256, ge=16, le=65_536)
    """Of prompts, in one step."""
    step_target_ms: float = Field(default=200, ge=1, le=10_000)
    """Aimed at for a step that computes prompts beside others' answers: their time between two tokens."""
    prompt_lookup_tokens: int = Field(default=6, ge=0, le=16)
    """Guessed to follow as they did before, and verified in one step, while one or two sequences run; 0: no
    guesses. Guessing pauses where it does not pay."""
    kv_cache_bytes: int = Field(default=0, ge=0)
    """For keys and values, what is kept of finished prompts included; 0 takes half of the memory that is
    available (the cgroup's limit counts), and never more than max_running whole contexts need."""
    prefix_cache: bool = True
    """Whether the beginning of a prompt that the tenant has sent before is kept and found again."""

    load_timeout_s: PositiveSeconds = 900
    """For loading the model, its conversion on first use included."""
    step_timeout_s: PositiveSeconds = 60
    """A step that takes longer is hung: the engine's process is killed and started again."""
    ping_interval_s: PositiveSeconds = 1
    ping_timeout_s: PositiveSeconds = 3
    """Health goes false where the engine's process does not answer for so long."""
    ping_kill_s: PositiveSeconds = 15
    """The engine's process is killed where it does not answer for so long."""
    restart_backoff_min_s: PositiveSeconds = 0.2
    restart_backoff_max_s: PositiveSeconds = 30

    echo_delay_ms: float = Field(default=0, ge=0, le=60_000)
    """Before each token of `echo`."""
    echo_directives: bool = False
    """Whether `echo` obeys directives inside prompts (docs/inference.md)."""
    echo_recovery_s: PositiveSeconds = 1
    """How long a crash that a directive asked for lasts."""

    @model_validator(mode="after")
    def _order(self) -> InferenceSettings:
        if not self.ping_interval_s < self.ping_timeout_s < self.ping_kill_s:
            raise ValueError("ping_interval_s < ping_timeout_s < ping_kill_s is needed")
        if self.restart_backoff_min_s > self.restart_backoff_max_s:
            raise ValueError("restart_backoff_min_s must not exceed restart_backoff_max_s")
        return self

    @property
    def models_path(self) -> Path:
        return self.models_dir or self.state_dir.parent / "models"

    @property
    def served_model_id(self) -> str:
        """The id that requests name."""
        if self.model_id:
            return self.model_id
        return PACKAGED_MODEL_ID if self.model_path is None else self.model_path.resolve().name


# What a child of this process may know of our environment: enough for Python, the linker, OpenMP and the
# caches of libraries, and nothing that is ours.
_CHILD_VARIABLES = frozenset(
    {"HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "TMPDIR", "TZ"}
)
_CHILD_PREFIXES = ("COVERAGE_", "CUDA_", "GOMP_", "KMP_", "MKL_", "OMP_", "PYTHON", "TORCH")
_CHILD_DEFAULTS = {
    # Threads that wait for each other sleep instead of spinning: on cores that are shared with the other
    # services, spinning makes a step several times slower (docs/decisions/0021).
    "OMP_WAIT_POLICY": "PASSIVE",
}
_CHILD_FIXED = {
    # Nothing is ever fetched from a model hub.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    # Progress is told in sentences, to the parent.
    "TQDM_DISABLE": "1",
}


def child_environment() -> Mapping[str, str]:
    """The environment of the engine's process."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _CHILD_VARIABLES or name.startswith(_CHILD_PREFIXES)
    }
    return _CHILD_DEFAULTS | kept | _CHILD_FIXED
