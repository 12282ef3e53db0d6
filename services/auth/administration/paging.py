"""Page tokens: where the page before ended, in a form that is nobody's business to read."""

from __future__ import annotations

import base64
import binascii
import re

from services.mesh.errors import RequestInvalid, Violation

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000
_ID = re.compile(r"[A-Za-z0-9:_-]{1,64}")
_PLACE = re.compile(r"([0-9]{1,18})\.([0-9]{1,18})")


def page_size(asked: int) -> int:
    """0 asks for the default."""
    return min(asked or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def after_id(token: str) -> str:
    """The last id of the page before; empty: there is none. Raises RequestInvalid."""
    if not token:
        return ""
    text = _decoded(token)
    if _ID.fullmatch(text) is None:
        raise _refused()
    return text


def token_after_id(resource_id: str) -> str:
    return _encoded(resource_id)


def before_place(token: str) -> tuple[int, int] | None:
    """The (version, index) of the last change of the page before. Raises RequestInvalid."""
    if not token:
        return None
    found = _PLACE.fullmatch(_decoded(token))
    if found is None:
        raise _refused()
    return int(found[1]), int(found[2])


def token_before_place(version: int, index: int) -> str:
    return _encoded(f"{version}.{index}")


def _encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _decoded(token: str) -> str:
    try:
        text = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode(
            "ascii"
        )
    except (binascii.Error, ValueError):
        raise _refused() from None
    if _encoded(text) != token:
        raise _refused()
    return text


def _refused() -> RequestInvalid:
    return RequestInvalid(
        "The page token is not one of ours.",
        hint="Send `next_page_token` as it came, with the same request.",
        violations=[Violation("page_token", "must be `next_page_token` of the page before")],
    )
