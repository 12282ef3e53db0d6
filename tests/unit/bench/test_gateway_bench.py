"""`make bench-gateway`: what its parts are made of is there, and it judges rightly."""

from __future__ import annotations

import asyncio
import json

import pytest

from services.gateway import app
from tests.bench import gateway_figures as figures
from tests.bench import gateway_load as load
from tests.bench import gateway_upstream as upstream
from tests.bench.figures import Spread
from tests.bench.gateway import SWITCHED_ON
from tests.bench.gateway_figures import Memory, Round, Streamed, Unary
from tests.bench.gateway_load import Job, Target, prompt
from tests.bench.gateway_pieces import LINKS, PARTS


def test_what_can_be_left_out_is_in_the_composition() -> None:
    for part, names in PARTS.items():
        for name in names:
            assert hasattr(app, name), f"{part}: services.gateway.app has no {name}"
    assert set(SWITCHED_ON) == PARTS.keys() >= LINKS.keys()


def measured(cpu_us: float, *, p50_ms: float = 1, p99_ms: float = 2, per_s: float = 100) -> Round:
    behind = Unary(per_s, 0.0001, 0.0005, 0)
    through = Unary(per_s, behind.p50_s + p50_ms / 1e3, behind.p99_s + p99_ms / 1e3, cpu_us / 1e6)
    return Round(through, behind, through, behind, through, Streamed(per_s, cpu_us / 1e7))


def test_the_judgement() -> None:
    rounds = {
        figures.OURS: [measured(500, p50_ms=1, p99_ms=10)] * 3,
        figures.ALL_ON: [measured(450, per_s=60)] * 3,
        figures.OFF: [measured(300, per_s=79)] * 3,
        figures.BARE: [measured(250, per_s=100)] * 3,
        figures.LITELLM: [measured(8000, p50_ms=12, p99_ms=250)] * 3,
        figures.SMG: [measured(160)] * 3,
    }
    memory = {figures.OURS: Memory(100_000_000, 151_000_000, 109_000_000, 10_000)}
    made = {aim.name: aim for aim in figures.aims(rounds, memory)}
    assert {name: aim.met for name, aim in made.items()} == {
        "added_p50_alone_vs_litellm": True,
        "added_p99_at_16_vs_litellm": True,
        "requests_per_cpu_s_vs_litellm": True,
        "tokens_per_cpu_s_vs_litellm": True,
        "cpu_per_request_vs_smg": False,
        "grpc_off_vs_bare": False,
        "grpc_off_vs_bare_per_cpu_s": True,
        "grpc_all_vs_bare": True,
        "grpc_all_vs_bare_per_cpu_s": True,
        "memory_mb": False,
        "memory_back_to_idle": True,
    }
    assert made["requests_per_cpu_s_vs_litellm"].measured.median == pytest.approx(16)
    assert made["cpu_per_request_vs_smg"].measured.median == pytest.approx(3.125)
    assert [table.row_count for table in figures.tables(rounds)] == [6, 6]
    assert figures.price_table({"nothing": [1e-4], "auth": [2e-4]}).row_count == 2


def test_of_many_rounds_the_quartiles_are_told_and_of_few_the_least_and_the_greatest() -> None:
    assert Spread.quartiles([9.0, 1.0, 2.0, 3.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.quartiles([3.0, 1.0, 8.0]) == Spread.of([3.0, 1.0, 8.0]) == Spread(3.0, 1.0, 8.0)
    rounds = {
        figures.OURS: [measured(each) for each in (300, 330, 360, 390, 5000)],
        figures.SMG: [measured(100)] * 5,
    }
    (aim,) = figures.aims(rounds, {})
    assert [aim.measured.median, aim.measured.least, aim.measured.greatest] == pytest.approx([3.6, 3.3, 3.9])


def test_only_what_was_measured_is_judged() -> None:
    rounds = {figures.OFF: [measured(300)], figures.BARE: [measured(250)]}
    assert [aim.name for aim in figures.aims(rounds, {})] == [
        "grpc_off_vs_bare",
        "grpc_off_vs_bare_per_cpu_s",
    ]


def test_each_request_is_another_one() -> None:
    text = prompt(5)
    assert len(text.split()) == 5
    assert load.numbered(b"a " + text.encode() + b" b", 42) == b"a word0 word1 word2 word3 #00000042 b"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_job_over_http(streamed: bool) -> None:
    server = await asyncio.get_running_loop().create_server(upstream.HttpEcho, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        target = Target("http", f"127.0.0.1:{port}", (("authorization", "Bearer x"),))
        job = Job(target, load.MODEL, words=7, streamed=streamed, streams=3, requests=20)
        done = await load.run(Job.read(job.line()))
        assert (done["requests"], done["tokens"]) == (20, 140 if streamed else 0)
        assert 0 < done["p50_s"] <= done["p99_s"]
        said = (await load.run(Job(target, load.MODEL, words=7, streamed=streamed)))["text"]
        assert said.split()[:-1] == prompt(7).split()[:-1]
        assert said.split()[-1] != prompt(7).split()[-1]


async def test_an_answer_that_is_none_fails_the_job() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = json.dumps({"error": "too much"}).encode()
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ExceptionGroup) as failed:
            await load.run(Job(Target("http", f"127.0.0.1:{port}"), load.MODEL, words=3, requests=1))
        assert "429" in str(failed.value.exceptions[0])
