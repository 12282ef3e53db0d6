"""Finds the first of many rules that matches a request, without asking them all.

An index is made for one effect and for what is known of a request. What is not known yet is decided when the
index is made: an allowing rule that depends on it may still hold, so that part of its condition is left out;
a denying one does not fire yet, so it is left out as a whole.

Each rule is then filed under one part of its condition, the one that it shares with the fewest other rules:
its models, its addresses, its tasks or a label. A request looks up what is filed under its own facts, and
asks only those rules whether the rest of their condition holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from ipaddress import IPv4Network, IPv6Network
from typing import Generic, TypeVar
from zoneinfo import ZoneInfo

from services.mesh.addresses import Address, NetworkMap
from services.mesh.policy import Effect, Network, Rule, TimeWindow

MODEL, TASK, TOKENS, LABELS = 1, 2, 4, 8
"""What may be known of a request, as bits. Its address and time always are."""

_Key = tuple[str, Hashable]
_V = TypeVar("_V")
_NO_BLOCKS: NetworkMap[bool] = NetworkMap()


class Glob:
    """A model id in which `*` stands for any characters.

    Matching takes the literal parts from left to right, each where it first occurs; a regular expression
    could be made to take exponential time by whoever writes the rule.
    """

    __slots__ = ("_middle", "exact", "head", "tail", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.exact = "*" not in text
        self.head, *self._middle = text.split("*")
        self.tail = "" if self.exact else self._middle.pop()

    def matches(self, model: str) -> bool:
        if self.exact:
            return model == self.head
        at, end = len(self.head), len(model) - len(self.tail)
        if at > end or not model.startswith(self.head) or not model.endswith(self.tail):
            return False
        for part in self._middle:
            found = model.find(part, at, end)
            if found < 0:
                return False
            at = found + len(part)
        return True


class Query:
    """What is known of a request, parsed once."""

    __slots__ = ("_local", "address", "at", "known", "labels", "max_tokens", "model", "task")

    def __init__(
        self,
        address: Address | None,
        at: datetime,
        model: str | None,
        task: str | None,
        max_tokens: int | None,
        labels: Mapping[str, str] | None,
    ) -> None:
        self.address = address
        self.at = at
        self.model = model
        self.task = task
        self.max_tokens = max_tokens
        self.labels = labels
        self.known = (
            (model is not None and MODEL)
            | (task is not None and TASK)
            | (max_tokens is not None and TOKENS)
            | (labels is not None and LABELS)
        )
        self._local: dict[tzinfo, tuple[int, int]] | None = None

    def local(self, zone: tzinfo) -> tuple[int, int]:
        """The day of the week, 1 for Monday, and the minute of the day, by the clocks on the wall there."""
        if self._local is None:
            self._local = {}
        found = self._local.get(zone)
        if found is None:
            there = self.at.astimezone(zone)
            found = self._local[zone] = (there.isoweekday(), there.hour * 60 + there.minute)
        return found


class RuleIndex(Generic[_V]):
    """Rules of one effect, each with a value, for requests of which the same is known."""

    def __init__(self, rules: Iterable[tuple[Rule, _V]], effect: Effect, known: int) -> None:
        """`rules` in the order in which they are preferred, where several match; `known` as in `Query`."""
        made = [(_Test(rule, effect, known), value) for rule, value in rules]
        self._entries = [each for each in made if effect is Effect.ALLOW or not each[0].unknown]
        self._always = next((value for test, value in self._entries if not test.conditional), None)
        self._exact: dict[str, list[int]] = {}
        self._heads: dict[int, dict[str, list[int]]] = {}
        self._tails: dict[int, dict[str, list[int]]] = {}
        self._tasks: dict[str, list[int]] = {}
        self._labels: dict[tuple[str, str], list[int]] = {}
        self._timed: list[int] = []
        self._open: tuple[int, list[int]] = (-1, [])
        """Those of `_timed` whose windows are open in a second, and that second."""
        self._rest: list[int] = []
        self._networks: NetworkMap[int] = NetworkMap()
        if self._always is None:
            self._file_all()

    def first(self, query: Query) -> _V | None:
        """The value of the first that matches; of one without condition, where there is one."""
        if self._always is not None or not self._entries:
            return self._always
        entries, best = self._entries, len(self._entries)
        for places in self._candidates(query):
            for place in places:
                if place >= best:
                    break
                if entries[place][0].holds(query):
                    best = place
        return entries[best][1] if best < len(entries) else None

    def _file_all(self) -> None:
        shared = Counter(key for test, _ in self._entries for keys in test.filings for key in keys)
        networks: list[tuple[Network, int]] = []
        for place, (test, _) in enumerate(self._entries):
            if not test.filings:
                (self._timed if test.times else self._rest).append(place)
                continue
            for key in min(test.filings, key=lambda keys: max(shared[key] for key in keys)):
                match key:
                    case ("model", str(model)):
                        self._exact.setdefault(model, []).append(place)
                    case ("head", str(head)):
                        self._heads.setdefault(len(head), {}).setdefault(head, []).append(place)
                    case ("tail", str(tail)):
                        self._tails.setdefault(len(tail), {}).setdefault(tail, []).append(place)
                    case ("task", str(task)):
                        self._tasks.setdefault(task, []).append(place)
                    case ("label", (str(name), str(value))):
                        self._labels.setdefault((name, value), []).append(place)
                    case ("network", IPv4Network() | IPv6Network() as block):
                        networks.append((block, place))
        self._networks = NetworkMap(networks)

    def _candidates(self, query: Query) -> list[Sequence[int]]:
        """Lists of places, each in ascending order."""
        found: list[Sequence[int]] = [self._rest] if self._rest else []
        model = query.model
        if model is not None:
            if (places := self._exact.get(model)) is not None:
                found.append(places)
            for length, heads in self._heads.items():
                if (places := heads.get(model[:length])) is not None:
                    found.append(places)
            for length, tails in self._tails.items():
                if (places := tails.get(model[-length:])) is not None:
                    found.append(places)
        if not self._networks.empty:
            found += self._networks.find(query.address)
        if self._tasks and query.task is not None:
            found.append(self._tasks.get(query.task, ()))
        if self._labels and query.labels is not None:
            found += [self._labels.get(item, ()) for item in query.labels.items()]
        if self._timed:
            found.append(self._open_now(query))
        return found

    def _open_now(self, query: Query) -> list[int]:
        # Once a second, not for each request: a window begins and ends with a minute.
        second = int(query.at.timestamp())
        if self._open[0] != second:
            entries = self._entries
            self._open = (second, [place for place in self._timed if entries[place][0].is_time(query)])
        return self._open[1]


class _Test:
    """A rule's condition, without what an index of `known` facts cannot decide."""

    __slots__ = (
        *("_above", "_addresses", "_exact", "_globs", "_labels", "_max_tokens", "_tasks"),
        *("conditional", "filings", "times", "unknown"),
    )

    def __init__(self, rule: Rule, effect: Effect, known: int) -> None:
        condition = rule.condition
        needs = (
            (MODEL if condition.models else 0)
            | (TASK if condition.tasks else 0)
            | (TOKENS if condition.max_tokens else 0)
            | (LABELS if condition.labels else 0)
        )
        self.unknown = bool(needs & ~known)
        """Whether it depends on what is not known."""
        use = needs & known
        globs = [Glob(text) for text in dict.fromkeys(condition.models)] if use & MODEL else []
        self._exact = frozenset(glob.text for glob in globs if glob.exact)
        self._globs = [glob for glob in globs if not glob.exact]
        self._tasks = frozenset(condition.tasks) if use & TASK else frozenset()
        self._max_tokens = condition.max_tokens if use & TOKENS else 0
        self._above = effect is Effect.DENY
        self._labels = frozenset(condition.labels.items()) if use & LABELS else frozenset()
        blocks = condition.addresses
        self._addresses = NetworkMap((block, True) for block in blocks) if blocks else _NO_BLOCKS
        self.times = [_Window(window, unknown=self._above) for window in condition.times]
        self.conditional = bool(use or condition.addresses or condition.times)
        self.filings = self._filings(blocks) if self.conditional else []
        """The ways to file it: under each key of one of these lists."""

    def holds(self, query: Query) -> bool:
        model, labels = query.model, query.labels
        if model is not None and model not in self._exact and (self._exact or self._globs):
            for glob in self._globs:
                if glob.matches(model):
                    break
            else:
                return False
        if self._tasks and query.task not in self._tasks:
            return False
        if self._max_tokens and ((query.max_tokens or 0) > self._max_tokens) != self._above:
            return False
        if self._labels and labels is not None and not self._labels <= labels.items():
            return False
        if not self._addresses.empty and not self._addresses.find(query.address):
            return False
        return not self.times or self.is_time(query)

    def is_time(self, query: Query) -> bool:
        return any(window.is_open(query) for window in self.times)

    def _filings(self, addresses: Iterable[Network]) -> list[list[_Key]]:
        filings: list[list[_Key]] = []
        if self._exact or self._globs:
            filings.append([("model", model) for model in self._exact])
            filings[0] += dict.fromkeys(_filed(glob) for glob in self._globs)
        if self._tasks:
            filings.append([("task", task) for task in self._tasks])
        if blocks := dict.fromkeys(addresses):
            filings.append([("network", block) for block in blocks])
        filings += [[("label", item)] for item in self._labels]
        return filings


def _filed(glob: Glob) -> _Key:
    """By its longer end; a tail is never empty, since the last characters of nothing are all."""
    return ("tail", glob.tail) if len(glob.tail) > len(glob.head) else ("head", glob.head)


class _Window:
    """A time window with its zone found. Wall clocks count: where they are set forward a minute may not
    occur, and where they are set back it occurs twice."""

    __slots__ = ("_days", "_end", "_start", "_unknown", "_zone")

    def __init__(self, window: TimeWindow, *, unknown: bool) -> None:
        """`unknown` is what it says where this machine does not know the time zone."""
        self._days = frozenset(window.days or range(1, 8))
        self._start = window.start_minute
        self._end = window.end_minute
        self._unknown = unknown
        self._zone = _zone(window.time_zone)

    def is_open(self, query: Query) -> bool:
        if self._zone is None:
            return self._unknown
        day, minute = query.local(self._zone)
        if self._start < self._end:
            return self._start <= minute < self._end and day in self._days
        # It ends on the next day, and belongs to the one on which it begins.
        if minute >= self._start and day in self._days:
            return True
        return minute < self._end and (day - 2) % 7 + 1 in self._days


def _zone(name: str) -> tzinfo | None:
    if name in ("", "UTC"):
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        return None
