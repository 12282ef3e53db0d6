"""Forged tokens of a corporate provider: all refused, and nobody is asked for their sake (R21)."""

from __future__ import annotations

import sys
import traceback
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.auth.providers.foreign_token import MAX_TOKEN_CHARS, parse
from services.mesh.errors import CredentialExpired, CredentialInvalid
from tests.framework.oidc_exchange import trust
from tests.framework.oidc_forgeries import forgeries
from tests.framework.oidc_provider import DISCOVERY, JWKS, MockProvider

MAX_REFUSAL_S = 0.5
"""Of one, on a busy machine; what R21 asks is measured on an idle one."""


async def test_r21_forged_tokens_of_a_provider_are_refused() -> None:
    async with MockProvider() as provider, MockProvider(number=1) as elsewhere, trust(provider) as corp:
        now = corp.clock.now()
        await corp.person()
        made = list(forgeries(provider, now, elsewhere.base))
        assert len(made) >= 100
        for name, token in made:
            began_s = perf_counter()
            with pytest.raises((CredentialInvalid, CredentialExpired)) as caught:
                await corp.verify(token)
            assert perf_counter() - began_s < MAX_REFUSAL_S, name
            assert len(caught.value.message) < 200, name
            assert caught.value.__context__ is None, name
        # unknown key ids may ask for the keys again, where they are configured to be, and nowhere else
        assert elsewhere.requests == []
        assert set(provider.requests) == {DISCOVERY, JWKS}
        assert provider.fetches == 1
        assert (await corp.person()).roles == {"user"}


async def test_r21_before_any_key_is_known_they_are_refused_too() -> None:
    async with MockProvider() as provider, MockProvider(number=1) as elsewhere, trust(provider) as corp:
        for name, token in forgeries(provider, corp.clock.now(), elsewhere.base):
            try:
                await corp.verify(token)
            except (CredentialInvalid, CredentialExpired):
                continue
            pytest.fail(name)
        assert elsewhere.requests == []
        assert provider.fetches == 1


async def test_r32_an_error_repeats_nothing_of_the_token() -> None:
    async with MockProvider() as provider, MockProvider(number=1) as elsewhere, trust(provider) as corp:
        for name, token in forgeries(provider, corp.clock.now(), elsewhere.base):
            try:
                await corp.verify(token)
            except (CredentialInvalid, CredentialExpired) as error:
                text = "".join(traceback.format_exception(error)) + str(error.metadata) + error.hint
                for segment in token.split("."):
                    assert len(segment) < 20 or segment not in text, name


@given(st.text(max_size=400))
def test_any_text_is_a_token_or_refused(text: str) -> None:
    with pytest.raises(CredentialInvalid):
        parse(text)


def test_what_is_read_is_bounded() -> None:
    with pytest.raises(CredentialInvalid, match="too long"):
        parse("a" * (MAX_TOKEN_CHARS + 1))
    # as deep as a token can be, which is deeper than Python goes
    assert sys.getrecursionlimit() < MAX_TOKEN_CHARS
