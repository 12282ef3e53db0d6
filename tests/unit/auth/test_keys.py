"""The form of API keys, and what is kept of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.auth.credentials import keys
from services.mesh.errors import CredentialInvalid


def test_a_key_has_its_form() -> None:
    text = keys.new_api_key()
    assert text.startswith("llmos_")
    assert len(text) == 42
    assert text[6:].isalnum()
    parsed = keys.parse_api_key(text)
    assert parsed.prefix == text[6:14]
    assert len(parsed.digest) == 32
    assert keys.matches(parsed.digest, keys.digest(text))


def test_a_known_key_parses() -> None:
    """Keeps the form stable: keys that were given out must go on working."""
    body = "0123456789ABCDEFGHIJabcdefghij"
    assert keys.parse_api_key(f"llmos_{body}4Us3aw").prefix == "01234567"


def test_keys_differ() -> None:
    made = {keys.new_api_key() for _ in range(100)}
    assert len(made) == 100
    assert len({keys.new_client_secret() for _ in range(100)}) == 100
    assert len({keys.new_key_id() for _ in range(100)}) == 100


@given(st.integers(0, 41), st.characters())
def test_a_typo_is_refused_without_a_query(place: int, character: str) -> None:
    text = keys.new_api_key()
    changed = text[:place] + character + text[place + 1 :]
    if changed == text:
        return
    with pytest.raises(CredentialInvalid):
        keys.parse_api_key(changed)


@given(st.text())
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(CredentialInvalid) as caught:
        keys.parse_api_key(f"llmos_{text}")
    # One and the same sentence, whatever was sent: so nothing of it is in there.
    assert str(caught.value) == "The API key is malformed."


def test_neither_repr_nor_digest_tells_the_key() -> None:
    text = keys.new_api_key()
    parsed = keys.parse_api_key(text)
    assert text[14:] not in repr(parsed)
    assert parsed.digest.hex() not in repr(parsed)


def test_a_client_secret_is_no_api_key() -> None:
    assert not keys.is_api_key(keys.new_client_secret())
    assert len(keys.new_client_secret()) >= 43
