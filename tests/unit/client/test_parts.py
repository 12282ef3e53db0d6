"""The pure parts of the client: what a stream must obey, when a call is tried again, what it is told."""

from __future__ import annotations

from pathlib import Path

import grpc
import llmos_client as sdk
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmos_client.calls import build_spec
from llmos_client.config import ClientConfig, is_local
from llmos_client.errors import from_status
from llmos_client.retry import Attempts, RetryThrottle
from llmos_client.streaming import StreamState
from llmos_client.tailing import LIFE_S, TailBreaks
from llmos_client.transport import new_trace_id
from opentelemetry.sdk.trace import TracerProvider

from tests.framework.scripted_gateway import answer, delta, started

POLICY = sdk.RetryPolicy(max_attempts=4, initial_backoff_s=0.2, max_backoff_s=5.0)


class Time:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


# ---- streams ----------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=4), max_size=12))
def test_a_whole_stream_adds_up(texts: list[str]) -> None:
    state = StreamState("t")
    for response in answer(*texts):
        state.accept(response)
    state.end()
    assert state.text == "".join(texts)
    assert state.completion().text == "".join(texts)


@given(st.integers(2, 12), st.data())
def test_each_loss_doubling_and_swap_is_seen(count: int, data: st.DataObject) -> None:
    responses = list(answer(*(str(i) for i in range(count))))
    place = data.draw(st.integers(1, count))
    match data.draw(st.sampled_from(["lose", "double", "swap"])):
        case "lose":
            responses.pop(place)
        case "double":
            responses.insert(data.draw(st.integers(place + 1, count + 1)), responses[place])
        case _:
            other = data.draw(st.integers(1, count).filter(lambda i: i != place))
            responses[place], responses[other] = responses[other], responses[place]
    state = StreamState("t")

    def run() -> None:
        for response in responses:
            state.accept(response)
        state.end()

    if [r.delta.seq for r in responses if r.HasField("delta")] == list(range(1, count)):
        run()  # the last delta was lost; only the usage can tell
    else:
        with pytest.raises(sdk.StreamBroken):
            run()


def test_tool_calls_are_put_together() -> None:
    state = StreamState("t")
    first, second = delta(1, ""), delta(2, "")
    first.delta.tool_calls.add(index=0, id="c1", name="add", arguments_json='{"a":')
    second.delta.tool_calls.add(index=0, arguments_json="1}")
    for response in (started(), first, second, answer()[-1]):
        state.accept(response)
    assert state.completion().choices[0].tool_calls == (sdk.ToolCall("c1", "add", '{"a":1}'),)


# ---- retries ----------------------------------------------------------------------------------------


@given(
    timeout_s=st.floats(0.01, 60),
    waits=st.lists(st.none() | st.floats(0, 40), min_size=8, max_size=8),
    draw=st.floats(0, 0.999),
)
def test_attempts_end_within_the_deadline(timeout_s: float, waits: list[float | None], draw: float) -> None:
    time = Time()
    attempts = Attempts(POLICY, RetryThrottle(), timeout_s, monotonic=time, draw=lambda: draw)
    made = 1
    try:
        for retry_after_s in waits:
            wait_s = attempts.failed(sdk.Unavailable("x", retry_after_s=retry_after_s))
            assert wait_s >= (retry_after_s or 0)
            time.now_s += wait_s
            made += 1
    except sdk.Unavailable:
        pass
    assert made <= POLICY.max_attempts
    assert time.now_s - 100.0 < timeout_s + 1e-6


def test_backoff_grows_and_is_bounded() -> None:
    waits = [POLICY.backoff_s(failures, 0.999) for failures in range(1, 12)]
    assert waits == sorted(waits)
    assert waits[-1] <= POLICY.max_backoff_s
    assert POLICY.backoff_s(1, 0.0) == 0.1


def test_retries_come_back_with_success() -> None:
    throttle = RetryThrottle()
    while throttle.failure():
        pass
    assert not throttle.failure()
    for _ in range(30):
        throttle.success()
    assert throttle.failure()


def test_a_policy_that_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="max_attempts"):
        sdk.RetryPolicy(max_attempts=0)
    with pytest.raises(ValueError, match="backoff"):
        sdk.RetryPolicy(initial_backoff_s=9, max_backoff_s=1)


# ---- the tail across breaks -------------------------------------------------------------------------


def tail_breaks(time: Time, timeout_s: float | None = None) -> TailBreaks:
    return TailBreaks(
        POLICY, RetryThrottle(), timeout_s=timeout_s, give_up_after_s=60, monotonic=time, draw=lambda: 0.5
    )


def failures_until_given_up(breaks: TailBreaks, time: Time) -> float:
    """Seconds."""
    begun_s = time.now_s
    for _ in range(1000):
        breaks.call_timeout_s()
        try:
            time.now_s += breaks.failed(sdk.Unavailable("down"))
        except sdk.Unavailable:
            return time.now_s - begun_s
    raise AssertionError("never given up")


def test_a_server_that_was_never_there_fails_fast() -> None:
    time = Time()
    assert failures_until_given_up(tail_breaks(time), time) < 3


def test_a_restart_is_ridden_out_and_a_loss_is_not() -> None:
    time = Time()
    breaks = tail_breaks(time)
    breaks.received()
    assert 60 <= failures_until_given_up(breaks, time) < 70


def test_a_quiet_tail_that_lasted_counts_as_alive() -> None:
    time = Time()
    breaks = tail_breaks(time)
    for _ in range(50):
        breaks.call_timeout_s()
        time.now_s += LIFE_S
        time.now_s += breaks.failed(sdk.Unavailable("connection aged"))


def test_the_servers_cap_is_no_failure_of_a_tail() -> None:
    time = Time()
    breaks = tail_breaks(time)
    for _ in range(50):
        breaks.call_timeout_s()
        time.now_s += 600
        assert breaks.failed(sdk.DeadlineExceeded("cap")) < 1


def test_a_tails_own_deadline_ends_it() -> None:
    time = Time()
    breaks = tail_breaks(time, timeout_s=10)
    breaks.received()
    assert breaks.call_timeout_s() == 10
    time.now_s += 10
    with pytest.raises(sdk.DeadlineExceeded):
        breaks.failed(sdk.DeadlineExceeded("ours"))


# ---- what a client is told --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:50050", True),
        ("127.8.8.8:1", True),
        ("localhost:1", True),
        ("[::1]:50050", True),
        ("dns:///localhost:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("ipv6:[::1]:1", True),
        ("unix:/run/llmos", True),
        ("llmos.example.com:443", False),
        ("127.0.0.1.example.com:1", False),
        ("localhost.example.com:1", False),
        ("dns:///10.0.0.1:1", False),
        ("ipv4:10.0.0.1:1", False),
        ("[2001:db8::1]:1", False),
        ("dns://127.0.0.1/llmos.example.com:443", False),
    ],
)
def test_which_targets_stay_on_this_machine(target: str, local: bool) -> None:
    assert is_local(target) is local


def test_an_argument_wins_over_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    env = {"LLMOS_API_KEY": "from-env", "LLMOS_TARGET": "127.0.0.1:9", "LLMOS_MODEL": "m"}
    config = ClientConfig.of(None, {}, env)
    assert (config.target, config.api_key, config.model) == ("127.0.0.1:9", "from-env", "m")
    config = ClientConfig.of("localhost:8", {"api_key_file": file, "model": "n"}, env)
    assert (config.target, config.api_key, config.model) == ("localhost:8", "from-file", "n")
    assert ClientConfig.of(None, {"api_key": "arg"}, env).api_key == "arg"
    assert ClientConfig.of(None, {}, {"LLMOS_API_KEY_FILE": str(file)}).api_key == "from-file"
    assert ClientConfig.of(None, {}, {}).api_key is None


def test_a_credential_does_not_leave_the_machine_in_clear() -> None:
    with pytest.raises(sdk.ConfigurationError, match="unencrypted") as caught:
        ClientConfig.of("llmos.example.com:50050", {"api_key": "s3cret"}, {})
    assert "s3cret" not in str(caught.value)
    assert ClientConfig.of("llmos.example.com:50050", {}, {}).api_key is None
    for options in (sdk.ClientOptions(tls=True), sdk.ClientOptions(allow_plaintext=True)):
        options["api_key"] = "s3cret"
        assert "s3cret" not in repr(ClientConfig.of("llmos.example.com:50050", options, {}))


@pytest.mark.parametrize("key", ["", "two words", "tabbed\tkey", "ümlaut", "line\nbreak"])
def test_a_credential_that_cannot_be_one_is_refused_unquoted(key: str) -> None:
    with pytest.raises(sdk.ConfigurationError) as caught:
        ClientConfig.of(None, {"api_key": key}, {})
    assert not key or key not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(sdk.ConfigurationError, match="nowhere"):
        ClientConfig.of(None, {"api_key_file": tmp_path / "nowhere"}, {})
    huge = tmp_path / "huge"
    huge.write_bytes(b"x" * 70_000)
    with pytest.raises(sdk.ConfigurationError, match="larger"):
        ClientConfig.of(None, {"api_key_file": huge}, {})
    with pytest.raises(sdk.ConfigurationError, match="belong together"):
        ClientConfig.of(None, {"tls_cert_file": huge}, {})
    with pytest.raises(sdk.ConfigurationError, match="URL"):
        ClientConfig.of("http://127.0.0.1:50050", {}, {})
    with pytest.raises(sdk.ConfigurationError, match="timeout_s"):
        ClientConfig.of(None, {"timeout_s": 0}, {})


def test_arguments_that_cannot_be_sent_are_refused_here() -> None:
    with pytest.raises(sdk.InvalidRequest, match="No model"):
        build_spec(None, "q", {})
    with pytest.raises(sdk.InvalidRequest, match="cannot be sent"):
        build_spec("m", "q", {"max_tokens": -1})
    with pytest.raises(sdk.InvalidRequest, match="cannot be sent"):
        build_spec("m", "q", {"seed": 2**64})
    with pytest.raises(sdk.InvalidRequest, match="raw text"):
        build_spec("m", sdk.RawText("t"), {"system": "s"})


def test_details_that_are_no_details_do_no_harm() -> None:
    metadata = [("grpc-status-details-bin", b"\xff\xff\xff"), ("x-request-id", "req_7")]
    error = from_status(grpc.StatusCode.INTERNAL, "boom", metadata, target="t")
    assert type(error) is sdk.ServerError
    assert error.request_id == "req_7"


def test_trace_ids_are_of_the_programs_own_span() -> None:
    with TracerProvider().get_tracer("t").start_as_current_span("work") as span:
        assert new_trace_id() == f"{span.get_span_context().trace_id:032x}"
    assert new_trace_id() != new_trace_id()
