"""The benches' own arithmetic: interleaving, ratios, aims, and what counts as not measured."""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import ModuleType

import psutil
import pytest

from tests.bench import auth, batch, engine, gateway, lookup, report, rounds, start
from tests.bench.aims import aims
from tests.bench.check import compare
from tests.bench.figures import Aim, Spread, ratio
from tests.bench.progress import Progress
from tests.bench.rounds import Plan, PrefixRound
from tests.bench.work import CannotMeasure, Stream, Work, prompt_of


def words(text: str) -> int:
    return len(text.split())


def decode(token_ids: object) -> str:
    return str(token_ids)


class Scripted:
    """A subject that takes `step_s` for a token and a fifth of that for each further stream."""

    def __init__(
        self, name: str, step_s: float, journal: list[str], *, answer: int = 7, short: int = 0
    ) -> None:
        self.name = name
        self._step_s = step_s
        self._journal = journal
        self._answer = answer
        self._short = short

    async def start(self) -> None:
        self._journal.append(f"start {self.name}")

    async def answer(self, work: Work) -> list[Stream]:
        self._journal.append(f"{self.name} {len(work.prompts)}")
        step_s = self._step_s * (1 + (len(work.prompts) - 1) / 5)
        tokens = work.max_tokens - self._short
        return [Stream(step_s, step_s * tokens, tokens, (self._answer,) * tokens) for _ in work.prompts]

    def processes(self) -> Mapping[str, psutil.Process]:
        return {"client": psutil.Process()}

    def rest(self) -> None:
        self._journal.append(f"rest {self.name}")

    def wake(self) -> None:
        self._journal.append(f"wake {self.name}")

    async def stop(self) -> None: ...


def plan(**changes: object) -> Plan:
    fields: dict[str, object] = {
        "levels": (1, 8),
        "rounds": 2,
        "prompt_tokens": 40,
        "max_tokens": 10,
        "seed": "s",
    }
    return Plan(count=words, **(fields | changes))  # type: ignore[arg-type]


def test_prompts_have_the_length_and_no_common_beginning() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    prompts = [prompt_of(100, random.Random(seed + index), words) for index in range(20)]
    assert all(85 <= words(prompt) <= 100 for prompt in prompts)
    assert len({prompt[:20] for prompt in prompts}) == 20
    assert plan().work(8, "round 0") == plan().work(8, "round 0")
    assert plan().work(8, "round 0") != plan().work(8, "round 1")


async def test_rounds_interleave_and_only_one_is_awake() -> None:
    journal: list[str] = []
    subjects = [Scripted("platform", 0.01, journal), Scripted("generate", 0.02, journal)]
    found = await rounds.measure({1: subjects, 8: subjects}, plan(), lambda text: None)
    answers = [line for line in journal if line[-1].isdigit()]
    assert answers == [
        *("platform 1", "generate 1", "platform 8", "generate 8"),
        *("generate 1", "platform 1", "generate 8", "platform 8"),
    ]
    for index in range(0, len(journal), 3):
        name = journal[index].removeprefix("wake ")
        assert journal[index : index + 3] == [f"wake {name}", journal[index + 1], f"rest {name}"]
    assert found.rates(1, "platform") == pytest.approx([100, 100])
    assert found.rates(8, "generate") == pytest.approx([8 * 50 / 2.4] * 2)
    made = {aim.name: aim for aim in aims(found, [PrefixRound(cold_s=1.0, cached_s=0.25)], "float32")}
    assert made["platform_vs_generate_8"].measured.median == pytest.approx(2)
    assert made["platform_vs_generate_8"].line() == "aim platform_vs_generate_8 2 1.2 met"
    assert made["cached_prefix_ttft_512"].line() == "aim cached_prefix_ttft_512 0.25 0.2 short"
    assert len(report.raw(found)) == 8
    assert report.table(found).row_count == 4
    assert report.cpu_table(found).row_count == 4


async def test_a_disturbed_batch_is_repeated_and_the_least_disturbed_counts() -> None:
    journal: list[str] = []
    said: list[str] = []
    stolen_s = iter((0.0, 9e6, 9e6, 9e6 + 5e3, 9e6 + 5e3, 18e6))
    found = await rounds.measure(
        {1: [Scripted("platform", 0.01, journal)]},
        plan(levels=(1,), rounds=1, repeats=2),
        said.append,
        stolen_s=lambda: next(stolen_s),
    )
    assert journal.count("platform 1") == 3
    (batch,) = found.batches[1]["platform"]
    assert batch.stolen > 0
    assert [line.split("others had ")[1].endswith(" % of the machine") for line in said] == [True] * 3
    shares = [float(line.split("others had ")[1].split(" ")[0]) for line in said]
    assert batch.stolen == pytest.approx(min(shares) / 100, rel=0.01)
    assert report.disturbance(found).startswith("A hypervisor gave others ")


async def test_an_undisturbed_batch_is_not_repeated() -> None:
    journal: list[str] = []
    subjects = {1: [Scripted("platform", 0.01, journal)]}
    await rounds.measure(subjects, plan(levels=(1,), repeats=2), lambda text: None, stolen_s=lambda: 7.0)
    assert journal.count("platform 1") == 2


async def test_no_round_begins_that_would_end_too_late() -> None:
    journal: list[str] = []
    time_s = iter(range(0, 10_000, 100))
    found = await rounds.measure(
        {1: [Scripted("platform", 0.01, journal)]},
        plan(levels=(1,), rounds=50, until_s=1000),
        lambda text: None,
        clock=lambda: float(next(time_s)),
    )
    assert 1 <= len(found.rates(1, "platform")) < 10


async def test_another_number_of_tokens_is_not_measured() -> None:
    with pytest.raises(CannotMeasure, match="generate gave"):
        await rounds.one(Scripted("generate", 0.01, [], short=1), Work(("a",), 10))


async def test_answers_are_compared_before_timing() -> None:
    journal: list[str] = []
    right, wrong = Scripted("generate", 0.1, journal), Scripted("platform", 0.1, journal, answer=8)
    work = Work(("a", "b"), 4)
    assert await compare(right, [right], work, exact=True, decode=decode) == {"generate": 1.0}
    assert await compare(right, [wrong], work, exact=False, decode=decode) == {"platform": 0.0}
    with pytest.raises(CannotMeasure, match="platform does not say what generate says"):
        await compare(right, [wrong], work, exact=True, decode=decode)


async def test_the_faster_way_of_serving_is_the_anchor() -> None:
    journal: list[str] = []
    servers = [Scripted("serve", 0.1, journal), Scripted("serve batching", 0.05, journal)]
    best = await rounds.faster(servers, plan(levels=(1, 8, 32)), Progress(), most=8, tokens=4)
    assert [best[level].name for level in (1, 8, 32)] == ["serve batching"] * 3
    assert [line for line in journal if line.startswith("serve batching")] == [
        "serve batching 1",
        "serve batching 8",
    ]


def test_a_ratio_is_taken_round_by_round() -> None:
    assert ratio([2, 30, 8], [1, 10, 2]) == Spread(3, 2, 4)
    assert str(Spread(1.2345, 1, 200)) == "1.23 (1..200)"
    assert Aim("x", Spread(0.95, 0, 1), 0.95).met
    assert not Aim("x", Spread(0.95, 0, 1), 0.9, at_most=True).met


@pytest.mark.parametrize("bench", [auth, batch, engine, gateway, lookup, start])
@pytest.mark.parametrize("rounds", ["0", "-1", "many"])
def test_a_bench_without_a_round_is_refused_with_a_sentence(
    bench: ModuleType, rounds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main([f"--rounds={rounds}"])
    assert "argument --rounds: " in capsys.readouterr().err
