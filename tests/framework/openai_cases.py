"""Cases for the official `openai` packages: written once as data, run by each, judged by one judge."""

from __future__ import annotations

import itertools
import json
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import openai

Json = dict[str, Any]
FILE = Path(__file__).parents[1] / "e2e" / "openai_clients" / "cases.json"
FIELDS = {"chat": "messages", "completions": "prompt", "responses": "input"}
NAMES = {
    # What the two packages call differently.
    "timeout": {"APITimeoutError", "APIConnectionTimeoutError"},
    "connection": {"APIConnectionError"},
    # Statuses without a class of their own.
    "APIError": {"APIError", "APIStatusError"},
}
_NO_TLS = ssl.create_default_context()
"""Made once: it would be most of what a case costs."""


def cases() -> list[Json]:
    """All cases, complete."""
    found: list[Json] = json.loads(FILE.read_text())
    for one in found:
        if one["call"] in FIELDS or one["call"] == "embeddings":
            one["with"].setdefault("model", "echo")
        if words := one.pop("pad_words", 0):
            one["with"]["messages"][0]["content"] = "w " * words
        if size := one.pop("pad_bytes", 0):
            text = "x" * size
            content = [{"role": "user", "content": text}] if one["call"] == "chat" else text
            one["with"][FIELDS[one["call"]]] = content
    return found


async def observe(one: Json, url: str, keys: Mapping[str, str]) -> Json:
    """What the package for Python sees: in the form in which tests/e2e/openai_clients/client.mjs tells it."""
    seen: Json = {"requests": 0, "status": None, "headers": {}, "answer": None, "events": [], "error": None}

    async def sent(request: httpx.Request) -> None:
        seen["requests"] += 1

    async def received(response: httpx.Response) -> None:
        seen["status"], seen["headers"] = response.status_code, dict(response.headers)

    http = openai.DefaultAsyncHttpxClient(
        verify=_NO_TLS, event_hooks={"request": [sent], "response": [received]}
    )
    async with openai.AsyncOpenAI(
        base_url=one.get("base_url", f"{url}/v1"),
        api_key=keys[one.get("key", "admin")],
        max_retries=one.get("retries", 0),
        timeout=one.get("timeout_ms", 20000) / 1000,
        http_client=http,
    ) as client:
        try:
            await _call(client, one, seen)
        except openai.APIError as error:
            fields = ("status_code", "code", "param", "type", "message")
            found = {name: getattr(error, name, None) for name in fields}
            seen["error"] = {"class": type(error).__name__, "status": found.pop("status_code"), **found}
    return seen


async def _call(client: openai.AsyncOpenAI, one: Json, seen: Json) -> None:
    options: Json = {"extra_headers": one.get("headers", {})}
    given = dict(one["with"])
    raw: Any
    match one["call"]:
        case "chat":
            raw = client.chat.completions.with_raw_response.create
        case "completions":
            raw = client.completions.with_raw_response.create
        case "responses":
            raw = client.responses.with_raw_response.create
        case "embeddings":
            raw = client.embeddings.with_raw_response.create
        case "models.list":
            raw = client.models.with_raw_response.list
        case "post":
            await client.post(given["path"], cast_to=httpx.Response, body={})
            return
        case named:
            kind, _, action = named.partition(".")
            raw = getattr(getattr(client, kind).with_raw_response, action)
            await _keep(await raw(given["id"], **options), one, seen)
            return
    await _keep(await raw(**given, **options, extra_body=one.get("extra")), one, seen)


async def _keep(raw: Any, one: Json, seen: Json) -> None:
    parsed = raw.parse()
    if not one["with"].get("stream"):
        seen["answer"] = parsed.to_dict() if parsed is not None else None
        return
    async for event in parsed:
        seen["events"].append(event.to_dict())
        if len(seen["events"]) == one.get("leave_after"):
            await parsed.close()
            break


def complaints(one: Json, seen: Json) -> list[str]:
    """What was seen and not expected; empty where all is well."""
    found = []
    expected: Json = one["expect"]
    view = _View(one, seen)
    for name, want in expected.items():
        if name == "error":
            found += view.error(want)
        elif name == "headers":
            got = {key: seen["headers"].get(key) or "" for key in want}
            found += [f"{key}: {got[key]}" for key in want if not re.fullmatch(want[key], got[key])]
        elif name == "answer":
            found += [f"{path}: {view.at(path)!r}" for path in want if view.at(path) != want[path]]
        else:
            try:
                got = getattr(view, name)()
            except (LookupError, TypeError):
                got = "nothing"
            if got != want:
                found.append(f"{name}: {got!r}, not {want!r}")
    if "error" not in expected and "breaks" not in expected and seen["error"] is not None:
        found.append(f"error: {seen['error']}")
    return found


class _View:
    """One observation, asked for in words that hold for all kinds of calls."""

    def __init__(self, one: Json, seen: Json) -> None:
        self._seen = seen
        self._is_response = one["call"] == "responses"
        self._whole: Json = seen["answer"] or {}
        self._events: list[Json] = seen["events"]

    def requests(self) -> int:
        return int(self._seen["requests"])

    def status(self) -> int:
        return int(self._seen["status"])

    def events(self) -> int:
        return len(self._events)

    def types(self) -> list[str]:
        """Without repeats: how a text is cut into deltas is the server's choice."""
        return [name for name, _ in itertools.groupby(event["type"] for event in self._events)]

    def breaks(self) -> bool:
        """The package for Node raises what the one for Python passes on as events."""
        error = self._seen["error"]
        return self.types()[-2:] == ["error", "response.failed"] or bool(
            error and error["class"] == "APIError"
        )

    def error(self, want: Json) -> list[str]:
        got = self._seen["error"]
        if got is None:
            return ["no error"]
        names = NAMES.get(want["class"], {want["class"]})
        wrong = [] if got["class"] in names else [f"class: {got['class']}"]
        rest = {name: got[name] for name in want if name != "class" and got[name] != want[name]}
        return wrong + [f"error: {rest}, {got['message']}"] * bool(rest)

    def at(self, path: str) -> Any:
        found: Any = self._whole
        for step in path.split("."):
            found = found[int(step)] if isinstance(found, list) else (found or {}).get(step)
        return found

    def text(self) -> str:
        return "".join(self.texts()[:1])

    def texts(self) -> list[str]:
        if self._is_response:
            if self._whole:
                return [part["text"] for item in self._whole["output"] for part in item["content"]]
            deltas = [e["delta"] for e in self._events if e["type"] == "response.output_text.delta"]
            return ["".join(deltas)]
        found: dict[int, str] = {}
        for choice in self._choices():
            piece = choice.get("message") or choice.get("delta") or choice
            found[choice["index"]] = found.get(choice["index"], "") + (
                piece.get("content") or piece.get("text") or ""
            )
        return [found[index] for index in sorted(found)]

    def finish(self) -> str | None:
        if self._is_response:
            return str((self._whole or self._events[-1]["response"])["status"])
        reasons = {choice["finish_reason"] for choice in self._choices()} - {None}
        return str(reasons.pop()) if len(reasons) == 1 else None

    def usage(self) -> list[int]:
        last = self._whole or self._events[-1]
        usage = last.get("response", last)["usage"]
        names = (
            ("input_tokens", "output_tokens") if self._is_response else ("prompt_tokens", "completion_tokens")
        )
        assert usage["total_tokens"] == sum(usage[name] for name in names)
        return [usage[name] for name in names]

    def logprobs(self) -> list[str]:
        if self._is_response:
            part = (self._whole or self._events[-1]["response"])["output"][0]["content"][0]
            return [entry["token"] for entry in part["logprobs"]]
        given = [choice["logprobs"] for choice in self._choices() if choice.get("logprobs")]
        if any("tokens" in each for each in given):
            return [token for each in given for token in each["tokens"]]
        return [entry["token"] for each in given for entry in each["content"]]

    def offsets(self) -> list[int]:
        given = [choice["logprobs"] for choice in self._choices() if choice.get("logprobs")]
        return [offset for each in given for offset in each["text_offset"]]

    def _choices(self) -> list[Json]:
        if self._whole:
            return list(self._whole["choices"])
        return [choice for event in self._events for choice in event["choices"]]
