"""private_key_jwt: a client's own signature passes once, every forgery is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from joserfc import jws
from joserfc.jwk import ECKey, OKPKey, RSAKey

from services.auth.store import Kind
from services.mesh.errors import CredentialInvalid, CredentialRevoked
from services.mesh.tokens import Audience
from tests.framework.access_tokens import b64

if TYPE_CHECKING:
    from conftest import Auth

ISSUER = "https://auth.example"
TOKEN_ENDPOINT = "https://api.example/oauth2/token"
Key = RSAKey | ECKey | OKPKey
KEYS: dict[str, Key] = {
    "rsa": RSAKey.generate_key(2048),
    "ec": ECKey.generate_key("P-256"),
    "okp": OKPKey.generate_key("Ed25519"),
}
OTHER: dict[str, Key] = {
    "rsa": RSAKey.generate_key(2048),
    "ec": ECKey.generate_key("P-256"),
    "okp": OKPKey.generate_key("Ed25519"),
}
ALL_ALGORITHMS = ["none", *jws.JWSRegistry.algorithms]


def jwks(*names: str) -> str:
    return json.dumps({"keys": [{**KEYS[name].as_dict(private=False), "kid": name} for name in names]})


def claims(auth: Auth, **changes: Any) -> dict[str, Any]:
    now = int(auth.clock.now().timestamp())
    made = {
        "iss": "app",
        "sub": "app",
        "aud": ISSUER,
        "jti": "one",
        "iat": now,
        "exp": now + 60,
    } | changes
    return {name: value for name, value in made.items() if value is not None}


def signed(key: Key, alg: str, payload: dict[str, Any] | str, **header: Any) -> str:
    text = payload if isinstance(payload, str) else json.dumps(payload)
    fields = {name: value for name, value in ({"alg": alg} | header).items() if value is not None}
    registry = jws.JWSRegistry(algorithms=ALL_ALGORITHMS, strict_check_header=False)
    return jws.serialize_compact(fields, text, key, registry=registry)


@pytest.fixture(autouse=True)
async def client(auth: Auth) -> None:
    """`app` with one key of each kind, and no secret."""
    await auth.tenant()
    await auth.client("app", jwks_json=jwks("rsa", "ec", "okp"))


async def token(auth: Auth, assertion: str, client_id: str = "app", secret: str = "") -> str:
    issued = await auth.exchange.by_secret(client_id, secret, Audience.GATEWAY, [], assertion=assertion)
    return issued.token


@pytest.mark.parametrize(
    ("kid", "alg"),
    [("rsa", "RS256"), ("rsa", "PS256"), ("ec", "ES256"), ("okp", "Ed25519"), ("okp", "EdDSA")],
)
async def test_a_clients_own_signature(auth: Auth, kid: str, alg: str) -> None:
    assertion = signed(KEYS[kid], alg, claims(auth), kid=kid, typ="JWT")
    assert (await auth.verify(await token(auth, assertion))).client_id == "app"


@pytest.mark.parametrize("audience", [TOKEN_ENDPOINT, [ISSUER], [ISSUER, TOKEN_ENDPOINT]])
async def test_for_the_token_endpoint_too(auth: Auth, audience: object) -> None:
    await token(auth, signed(KEYS["ec"], "ES256", claims(auth, aud=audience), kid="ec"))


async def test_without_a_key_id_where_one_key_fits(auth: Auth) -> None:
    await token(auth, signed(KEYS["ec"], "ES256", claims(auth)))
    await auth.change(
        Kind.CLIENT,
        "app",
        jwks_json=json.dumps(
            {"keys": [KEYS["ec"].as_dict(private=False), OTHER["ec"].as_dict(private=False)]}
        ),
    )
    with pytest.raises(CredentialInvalid):
        await token(auth, signed(KEYS["ec"], "ES256", claims(auth, jti="two")))


async def test_serves_once(auth: Auth) -> None:
    assertion = signed(KEYS["ec"], "ES256", claims(auth), kid="ec")
    await token(auth, assertion)
    with pytest.raises(CredentialInvalid):
        await token(auth, assertion)
    await auth.clock.advance(64)
    await auth.store.prune(auth.clock.now())
    with pytest.raises(CredentialInvalid):
        await token(auth, assertion)


async def test_a_refused_one_uses_up_no_id(auth: Auth) -> None:
    with pytest.raises(CredentialInvalid):
        await token(auth, signed(OTHER["ec"], "ES256", claims(auth), kid="ec"))
    await token(auth, signed(KEYS["ec"], "ES256", claims(auth), kid="ec"))


async def test_ids_of_two_clients_do_not_meet(auth: Auth) -> None:
    await auth.client("other", jwks_json=jwks("ec"))
    await token(auth, signed(KEYS["ec"], "ES256", claims(auth), kid="ec"))
    other = claims(auth, iss="other", sub="other")
    await token(auth, signed(KEYS["ec"], "ES256", other, kid="ec"), "other")


async def test_disabled_is_said_to_the_client_alone(auth: Auth) -> None:
    await auth.change(Kind.CLIENT, "app", disabled=True)
    with pytest.raises(CredentialRevoked):
        await token(auth, signed(KEYS["ec"], "ES256", claims(auth), kid="ec"))
    with pytest.raises(CredentialInvalid):
        await token(auth, signed(OTHER["ec"], "ES256", claims(auth), kid="ec"))


async def test_a_secret_besides_is_refused(auth: Auth) -> None:
    with pytest.raises(CredentialInvalid):
        await token(auth, signed(KEYS["ec"], "ES256", claims(auth), kid="ec"), secret="x")


@pytest.mark.parametrize("stored", ["", "{}", "[", '{"keys": []}', "[" * 9000])
async def test_a_client_without_usable_keys(auth: Auth, stored: str) -> None:
    await auth.change(Kind.CLIENT, "app", jwks_json=stored)
    with pytest.raises(CredentialInvalid):
        await token(auth, signed(KEYS["ec"], "ES256", claims(auth), kid="ec"))


def forgeries(auth: Auth) -> Iterator[tuple[str, str]]:
    """(name, assertion)"""
    good, now = claims(auth), int(auth.clock.now().timestamp())
    for kid, alg in (("rsa", "RS256"), ("ec", "ES256"), ("okp", "Ed25519")):
        yield f"another {kid} key", signed(OTHER[kid], alg, good, kid=kid)
    for alg in ("RS384", "RS512", "PS384", "PS512"):
        yield alg, signed(KEYS["rsa"], alg, good, kid="rsa")
    yield "the key of another algorithm", signed(KEYS["ec"], "ES256", good, kid="rsa")
    yield "an unknown key", signed(KEYS["ec"], "ES256", good, kid="nobody")
    yield "an empty key id", signed(KEYS["ec"], "ES256", good, kid="")
    yield (
        "a key id that is no text",
        signed(OTHER["ec"], "ES256", good).replace(
            b64(b'{"alg":"ES256"}'), b64(b'{"alg":"ES256","kid":null}')
        ),
    )
    for name in ("jwk", "jku", "x5u", "x5c", "crit", "zip", "b64"):
        header = b64(json.dumps({"alg": "ES256", "kid": "ec", name: "x"}).encode())
        text = signed(KEYS["ec"], "ES256", good, kid="ec")
        yield f"{name} in the header", ".".join([header, *text.split(".")[1:]])
    for alg in ("none", "HS256", "", None, ["ES256"]):
        header = b64(json.dumps({"alg": alg, "kid": "ec"}).encode())
        yield f"alg {alg!r}", ".".join([header, *signed(KEYS["ec"], "ES256", good, kid="ec").split(".")[1:]])
    for typ in ("at+jwt", "dpop+jwt", "logout+jwt"):
        yield f"typ {typ}", signed(KEYS["ec"], "ES256", good, kid="ec", typ=typ)
    wrong: dict[str, list[Any]] = {
        "iss": [None, "other", "", 1],
        "sub": [None, "other", "", ["app"]],
        "aud": [
            None,
            "",
            [],
            "https://other.example",
            f"{ISSUER}/",
            [ISSUER, "https://other.example"],
            [ISSUER] * 5,
            {"a": ISSUER},
        ],
        "jti": [None, "", "j" * 257, 1, "a b", "a\x00"],
        "exp": [None, now - 6, now + 3700, "soon", True, float("nan"), -1],
        "nbf": [now + 60, "now"],
        "iat": [now + 60, "now", True],
    }
    for name, values in wrong.items():
        for value in values:
            payload = claims(auth, **{name: value})
            yield f"{name} {str(value)[:30]!r}", signed(KEYS["ec"], "ES256", payload, kid="ec")
    text = signed(KEYS["ec"], "ES256", good, kid="ec")
    head, body, signature = text.split(".")
    yield "no signature", f"{head}.{body}."
    yield "two segments", f"{head}.{body}"
    yield "four segments", f"{text}.x"
    yield "changed", f"{head}.{b64(json.dumps(claims(auth, jti='z')).encode())}.{signature}"
    yield (
        "a name twice",
        signed(KEYS["ec"], "ES256", json.dumps(good).replace("{", '{"sub": "x", ', 1), kid="ec"),
    )
    yield "not JSON", signed(KEYS["ec"], "ES256", "hello", kid="ec")
    yield "nested deeply", signed(KEYS["ec"], "ES256", "[" * 3000, kid="ec")
    yield "too long", "a" * 9000
    yield "empty but for dots", ".."


async def test_r21_every_forged_assertion_is_refused(auth: Auth) -> None:
    made = list(forgeries(auth))
    assert len(made) > 50
    for _, assertion in made:
        with pytest.raises(CredentialInvalid) as caught:
            await token(auth, assertion)
        assert all(part not in caught.value.message for part in assertion.split(".") if len(part) > 10)
    for client_id in ("nobody", "service:gateway", "service:nobody", ""):
        payload = claims(auth, iss=client_id, sub=client_id)
        with pytest.raises(CredentialInvalid):
            await token(auth, signed(KEYS["ec"], "ES256", payload, kid="ec"), client_id)
    await token(auth, signed(KEYS["ec"], "ES256", claims(auth), kid="ec"))
