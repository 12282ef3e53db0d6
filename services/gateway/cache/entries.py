"""An answer as it is kept: whole, with what it was computed by."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from services.gateway.cache.flights import Flight
from services.gateway.generation import Choice, Delta, Finished, Started, Usage


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """A complete answer."""

    stored_at_s: float
    """Seconds since 1970, so that gateways that share it agree on its age."""
    model_revision: str
    numerics_id: str
    choices: tuple[Choice, ...]
    usage: Usage
    """What the engine counted when it computed it."""

    def as_flight(self) -> Flight:
        """As one that is over, for requests that come when it is. One delta for each choice that holds
        anything."""
        flight = Flight()
        flight.started = Started("", "", self.model_revision, 0)
        full = [choice for choice in self.choices if choice.text or choice.token_ids]
        for seq, choice in enumerate(full, 1):
            flight.deltas.append(Delta(seq, choice.index, choice.text, choice.token_ids, choice.logprobs))
        flight.add(Finished(tuple(choice.finish_reason for choice in self.choices), self.usage))
        return flight


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(KeptAnswer)


def encode(answer: KeptAnswer) -> bytes:
    return _encoder.encode(answer)


def decode(value: bytes) -> KeptAnswer | None:
    """None for what is no answer, or one of another version's."""
    try:
        return _decoder.decode(value)
    except msgspec.MsgspecError:
        return None
