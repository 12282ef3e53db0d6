"""An engine's loop over `PageModel`, with a clock that a test moves."""

from __future__ import annotations

from services.inference.engine import frames
from services.inference.engine.detokenizer import Spelling, TokenTable
from services.inference.engine.loop import EngineLoop, LoadedModel
from services.inference.engine.port import GenerationRequest, ModelInfo, Prompt, Sampling
from services.inference.engine.sampler import SamplingDefaults
from services.inference.engine.scheduler import ScheduleLimits
from services.inference.engine.step import PAGE_TOKENS, Step
from services.inference.engine.tokenizer import PromptTokenizer
from tests.framework.page_model import PageModel

CONTEXT_TOKENS = 512
MAX_OUTPUT_TOKENS = 64
EOS = 2
LIMITS = ScheduleLimits(max_running=4, max_prefill_tokens=32, min_prefill_tokens=8)
ENDS = (frames.JobFinished, frames.JobFailed, frames.JobCancelled, frames.JobCounted)
_MAX_TURNS = 20_000


POISON = "~"
"""The step fails on this character. The model never says it."""
_POISON_TOKEN = 256


class _Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8: quick, and an answer may hold half a character."""

    chat_template = None

    def encode(self, text: str) -> list[int]:
        poison = POISON.encode()[0]
        return [_POISON_TOKEN if byte == poison else byte for byte in text.encode()]


class _Numbers:
    """A tokenizer for models without one: a text is the ids of its tokens."""

    chat_template = None

    def encode(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]


class LoopBase:
    """A loop over any step, and its events."""

    def __init__(
        self,
        step: Step,
        *,
        tokenizer: PromptTokenizer | None = None,
        limits: ScheduleLimits = LIMITS,
        keep_prefixes: bool = True,
    ) -> None:
        """Without a tokenizer, texts are the ids of their tokens."""
        pieces = [f"{token} ".encode() for token in range(step.vocab_tokens)]
        table = TokenTable(pieces, frozenset(), Spelling(str.encode))
        self.tokenizer = tokenizer or PromptTokenizer(_Numbers(), table)
        self.limits = limits
        self.pages = step.pages
        self.now_s = 0.0
        self.step_s = 0.0
        """How long each step takes on the test's clock."""
        context_tokens = min(step.context_tokens, step.pages * PAGE_TOKENS)
        info = ModelInfo("page-model", "1", context_tokens)
        model = LoadedModel(info, step, self.tokenizer, frozenset({EOS}), SamplingDefaults())
        self.loop = EngineLoop(
            model, limits, self._monotonic, max_output_tokens=MAX_OUTPUT_TOKENS, keep_prefixes=keep_prefixes
        )
        self.events: list[frames.JobEvent] = []

    def _monotonic(self) -> float:
        # Read before and after a step, and once or twice for deadlines.
        self.now_s += self.step_s / 4
        return self.now_s

    def turn(self) -> None:
        self.events += self.loop.step()
        assert self.loop.running <= self.limits.max_running
        assert 0 <= self.loop.state.kv_pages_used <= self.pages

    def run(self) -> None:
        """To the end of all jobs."""
        for _ in range(_MAX_TURNS):
            if self.loop.idle:
                assert self.loop.state.kv_pages_used == 0
                return
            self.turn()
        raise AssertionError("the loop does not come to an end")

    def of(self, job: int) -> list[frames.JobEvent]:
        return [event for event in self.events if event.job == job]

    def tokens(self, job: int) -> list[list[int]]:
        """Of each choice that has any."""
        deltas = [event for event in self.of(job) if isinstance(event, frames.JobDelta)]
        choices = sorted({delta.choice for delta in deltas})
        return [[i for d in deltas if d.choice == choice for i in d.token_ids] for choice in choices]

    def text(self, job: int, choice: int = 0) -> str:
        deltas = [event for event in self.of(job) if isinstance(event, frames.JobDelta)]
        return "".join(delta.text for delta in deltas if delta.choice == choice)

    def end(self, job: int) -> frames.JobEvent:
        """The job's one end, which is its last word."""
        (end,) = [event for event in self.of(job) if isinstance(event, ENDS)]
        assert self.of(job)[-1] == end
        return end

    def failure(self, job: int) -> frames.JobFailed:
        end = self.end(job)
        assert isinstance(end, frames.JobFailed), end
        return end

    def started(self) -> list[int]:
        """Jobs, in the order in which they began."""
        return [event.job for event in self.events if isinstance(event, frames.JobStarted)]


class LoopBench(LoopBase):
    """Over `PageModel`; tokens are bytes."""

    def __init__(
        self,
        *,
        pages: int = 4 * CONTEXT_TOKENS // PAGE_TOKENS,
        limits: ScheduleLimits = LIMITS,
        says_below: int = _POISON_TOKEN,
    ) -> None:
        """`says_below`: the answers have so many different tokens."""
        pieces = [*(bytes([byte]) for byte in range(256)), POISON.encode()]
        self.step = PageModel(
            pages=pages,
            vocab_tokens=len(pieces),
            context_tokens=CONTEXT_TOKENS,
            says_below=says_below,
            fails_on=lambda row: _POISON_TOKEN in row.tokens,
        )
        table = TokenTable(pieces, frozenset(), Spelling(str.encode))
        super().__init__(self.step, tokenizer=PromptTokenizer(_Bytes(), table), limits=limits)


def request(text: str, **fields: object) -> GenerationRequest:
    """Sampled with a seed, unless `sampling` says otherwise."""
    defaults: dict[str, object] = {"max_tokens": 6, "sampling": Sampling(seed=7, temperature=0.8)}
    return GenerationRequest("req", "page-model", Prompt(text=text), **(defaults | fields))  # type: ignore[arg-type]
