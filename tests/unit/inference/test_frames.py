"""The border between the processes: what goes through, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.inference.engine import frames
from services.inference.engine.port import (
    Alternative,
    Capability,
    GenerationRequest,
    Message,
    ModelInfo,
    Prompt,
    Role,
    Sampling,
    TokenLogprob,
)

REQUEST = GenerationRequest(
    request_id="req_1",
    model="m",
    prompt=Prompt(messages=(Message(Role.USER, "Grüße 🦙"),)),
    sampling=Sampling(seed=2**64 - 1, temperature=0.5, logit_bias=((3, -1.5),)),
    stop=("###",),
    timeout_s=1.5,
)
COMMANDS = [
    frames.Configure(
        *("m", None, "/models", "auto", "auto", "cpu", "auto"), *(0, 8, 8, 64, 64, 100.0, 6, 0, True)
    ),
    frames.Submit(1, REQUEST),
    frames.Cancel(1),
    frames.Count(2, Prompt(text="text")),
    frames.Ping(),
]
LOGPROB = TokenLogprob(Alternative(5, b"\xf0\x9f", -0.5), (Alternative(5, b"\xf0\x9f", -0.5),))
REPORTS = [
    frames.Progress("loading"),
    frames.LoadFailed("no"),
    frames.Ready(ModelInfo("m", "r", 8, (Capability.CHAT,), "n", True, True), 16),
    frames.StepReport(
        (
            frames.JobStarted(1, 5),
            frames.JobDelta(1, 0, "a", (5,), (LOGPROB,)),
            frames.JobFinished(1, ("stop",), 5, 1),
            frames.JobFailed(2, "REQUEST_INVALID", "no", (("spec.n", "too many"),)),
            frames.JobCancelled(3),
            frames.JobCounted(4, 7),
        ),
        1,
        2,
    ),
    frames.Pong(),
]


def body(frame: frames.Frame) -> bytes:
    data = frames.encode(frame)
    header, rest = data[: frames.HEADER.size], data[frames.HEADER.size :]
    assert frames.body_bytes(header) == len(rest)
    return rest


@pytest.mark.parametrize("frame", COMMANDS, ids=lambda frame: type(frame).__name__)
def test_commands_come_through(frame: frames.Command) -> None:
    assert frames.decode_command(body(frame)) == frame


@pytest.mark.parametrize("frame", REPORTS, ids=lambda frame: type(frame).__name__)
def test_reports_come_through(frame: frames.Report) -> None:
    assert frames.decode_report(body(frame)) == frame


@given(st.binary(max_size=200))
@example(b"\x91\xa9\x80onfigure")  # a name that is no UTF-8
def test_anything_else_is_refused(data: bytes) -> None:
    for decode in (frames.decode_command, frames.decode_report):
        try:
            decode(data)
        except frames.FrameError:
            continue


def test_one_sides_frames_are_not_the_others() -> None:
    with pytest.raises(frames.FrameError):
        frames.decode_command(body(frames.Pong()))
    with pytest.raises(frames.FrameError):
        frames.decode_report(body(frames.Ping()))


def test_a_frame_is_bounded_both_ways() -> None:
    with pytest.raises(frames.FrameError, match="limit"):
        frames.encode(frames.Progress("x" * (frames.MAX_FRAME_BYTES + 1)))
    with pytest.raises(frames.FrameError, match="limit"):
        frames.body_bytes(frames.HEADER.pack(frames.MAX_FRAME_BYTES + 1))
