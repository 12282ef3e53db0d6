"""What a stream must obey, event by event, and what it adds up to. Pure; the same for both clients."""

from __future__ import annotations

from dataclasses import dataclass

from llmos.gateway.v1 import generation_service_pb2

from llmos_client.errors import StreamBroken, StreamIncomplete
from llmos_client.generation_types import (
    Choice,
    Completion,
    Delta,
    Event,
    Finished,
    FinishReason,
    Moved,
    Started,
    ToolCall,
    ToolCallDelta,
    Usage,
)


@dataclass
class _ToolCallParts:
    id: str
    name: str
    arguments: list[str]


class StreamState:
    """Accepts the responses of one stream in order, and keeps what they say."""

    def __init__(self, trace_id: str) -> None:
        self.trace_id = trace_id
        self.started: Started | None = None
        self.finished: Finished | None = None
        self.last_seq = 0
        self._texts: dict[int, list[str]] = {}
        self._tool_calls: dict[int, dict[int, _ToolCallParts]] = {}

    @property
    def request_id(self) -> str:
        """Empty before Started."""
        return self.started.request_id if self.started else ""

    @property
    def text(self) -> str:
        """What has arrived of the first choice."""
        return self.text_of(0)

    def text_of(self, choice_index: int) -> str:
        """What has arrived of one choice."""
        parts = self._texts.get(choice_index)
        if parts is None:
            return ""
        if len(parts) > 1:  # so that asking for it after each delta does not take quadratic time
            parts[:] = ["".join(parts)]
        return parts[0]

    def accept(self, response: generation_service_pb2.StreamGenerateResponse) -> Event | None:
        """The event; None for one of a later version. Raises StreamBroken."""
        kind = response.WhichOneof("event")
        if kind is None:
            return None
        if self.finished is not None:
            raise self._broken(f"{kind} came after finished")
        if (kind == "started") != (self.started is None):
            raise self._broken("started came twice" if self.started else f"{kind} came before started")
        match kind:
            case "started":
                self.started = Started.from_proto(response.started)
                return self.started
            case "delta":
                return self._delta(Delta.from_proto(response.delta))
            case "moved":
                return Moved(response.moved.stream_id)
            case "finished":
                self.finished = Finished.from_proto(response.finished)
                return self.finished

    def end(self) -> None:
        """The server ended the stream with OK. Raises StreamIncomplete where Finished did not come."""
        if self.finished is None:
            raise StreamIncomplete(
                "The stream ended without its last event, so the answer is only a beginning.",
                request_id=self.request_id,
                trace_id=self.trace_id,
                hint="Send the request again.",
            )

    def completion(self) -> Completion:
        """The whole answer. Raises StreamIncomplete before the end."""
        self.end()
        started, finished = self.started, self.finished
        if started is None or finished is None:
            raise AssertionError("end() has checked this")
        reasons = dict(enumerate(finished.finish_reasons))
        indices = sorted({*self._texts, *self._tool_calls, *reasons})
        return Completion(
            choices=tuple(
                Choice(i, self.text_of(i), reasons.get(i, FinishReason.UNKNOWN), self._calls_of(i))
                for i in indices
            ),
            usage=finished.usage,
            request_id=started.request_id,
            trace_id=self.trace_id,
            model=started.model,
            model_revision=started.model_revision,
            seed=started.seed,
        )

    def _delta(self, delta: Delta) -> Delta:
        if delta.seq != self.last_seq + 1:
            what = "came twice" if delta.seq <= self.last_seq else "followed"
            raise self._broken(f"delta {delta.seq} {what} after delta {self.last_seq}")
        self.last_seq = delta.seq
        if delta.text:
            self._texts.setdefault(delta.choice_index, []).append(delta.text)
        for piece in delta.tool_calls:
            self._piece(delta.choice_index, piece)
        return delta

    def _piece(self, choice_index: int, piece: ToolCallDelta) -> None:
        calls = self._tool_calls.setdefault(choice_index, {})
        parts = calls.setdefault(piece.index, _ToolCallParts("", "", []))
        parts.id = parts.id or piece.id
        parts.name = parts.name or piece.name
        parts.arguments.append(piece.arguments_json)

    def _calls_of(self, choice_index: int) -> tuple[ToolCall, ...]:
        calls = self._tool_calls.get(choice_index, {})
        return tuple(
            ToolCall(parts.id, parts.name, "".join(parts.arguments)) for _, parts in sorted(calls.items())
        )

    def _broken(self, what: str) -> StreamBroken:
        return StreamBroken(
            f"The stream broke its order: {what}.",
            request_id=self.request_id,
            trace_id=self.trace_id,
            hint="Send the request again, and report this to your operator.",
        )


class StreamFacts:
    """What both `Stream` and `AsyncStream` tell about themselves."""

    _state: StreamState

    @property
    def text(self) -> str:
        """What has arrived of the first choice."""
        return self._state.text

    @property
    def started(self) -> Started | None:
        """The first event: model, revision, seed; None before it."""
        return self._state.started

    @property
    def request_id(self) -> str:
        """Finds the request in logs, traces and the audit log; empty before the first event."""
        return self._state.request_id

    @property
    def trace_id(self) -> str:
        """32 hex digits."""
        return self._state.trace_id

    @property
    def finished(self) -> Finished | None:
        """The last event; None before it."""
        return self._state.finished

    @property
    def usage(self) -> Usage | None:
        """None before the end."""
        return self._state.finished.usage if self._state.finished else None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Of the first choice; None before the end."""
        finished = self._state.finished
        return finished.finish_reasons[0] if finished and finished.finish_reasons else None
