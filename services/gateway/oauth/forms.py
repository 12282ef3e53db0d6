"""What OAuth2 clients send: form bodies and client credentials, read strictly.

An error of the protocol is a RequestInvalid or CredentialInvalid whose metadata says the OAuth error code
under `oauth_error`; `answers` makes the response of it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn
from urllib.parse import parse_qsl, unquote_plus

from services.gateway.oauth.ports import ClientProof, SubjectKind
from services.mesh.access_token import Audience
from services.mesh.compact_jws import Malformed, decode, parse_object
from services.mesh.errors import CredentialInvalid, CredentialMissing, RequestInvalid

MAX_BODY_BYTES = 64 * 1024
MAX_FIELDS = 32
MAX_SCOPES = 64
OAUTH_ERROR = "oauth_error"

CLIENT_CREDENTIALS = "client_credentials"
TOKEN_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"  # noqa: S105 (no secret)
ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
ACCESS_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105
JWT_TYPE = "urn:ietf:params:oauth:token-type:jwt"
SUBJECT_TYPES: Mapping[str, SubjectKind] = {
    ACCESS_TOKEN_TYPE: SubjectKind.ACCESS_TOKEN,
    JWT_TYPE: SubjectKind.JWT,
    "urn:ietf:params:oauth:token-type:id_token": SubjectKind.JWT,
    "urn:llmos:params:oauth:token-type:api_key": SubjectKind.API_KEY,
}
_CLIENT_ID = re.compile(r"[\x21-\x7e]{1,64}")
_AUDIENCES = {audience.value: audience for audience in (Audience.GATEWAY, Audience.AUTH)}


def refuse(code: str, why: str) -> NoReturn:
    """Raises RequestInvalid with an error code of RFC 6749, section 5.2, or RFC 8693, section 2.2.2."""
    raise RequestInvalid(why, hint="", metadata={OAUTH_ERROR: code})


class Form:
    """The parameters of a request. One that is empty counts as left out (RFC 6749, section 3.2)."""

    def __init__(self, body: bytes, content_type: str) -> None:
        """Raises RequestInvalid for another content type, a repeated parameter (RFC 6749, section 3.2), and
        what is not a form in UTF-8 of at most `MAX_FIELDS` parameters."""
        if content_type.partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
            refuse("invalid_request", "The content type must be application/x-www-form-urlencoded.")
        try:
            pairs = parse_qsl(
                body.decode("utf-8"), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict"
            )
        except ValueError:
            pairs = None
        if pairs is None:
            refuse("invalid_request", f"The body is not a form of at most {MAX_FIELDS} parameters in UTF-8.")
        self._fields = dict(pairs)
        if len(self._fields) != len(pairs):
            refuse("invalid_request", "A parameter is repeated.")

    def get(self, name: str) -> str:
        """Empty where it is left out."""
        return self._fields.get(name, "")

    def require(self, name: str) -> str:
        """Raises RequestInvalid where it is left out."""
        value = self.get(name)
        if not value:
            refuse("invalid_request", f"The parameter {name} is missing.")
        return value

    def refuse_any(self, *names: str, code: str = "invalid_request") -> None:
        """Raises RequestInvalid where one is there: to ignore it would be to grant what nobody asked for."""
        for name in names:
            if self.get(name):
                refuse(code, f"The parameter {name} is not supported.")

    def scopes(self) -> Sequence[str]:
        """None: all that there are."""
        scopes = self.get("scope").split()
        if len(scopes) > MAX_SCOPES or any(len(scope) > 64 for scope in scopes):
            refuse("invalid_scope", "There is no such scope.")
        return scopes

    def audience(self) -> Audience:
        """Whom the token shall be for: the gateway where nothing is said."""
        self.refuse_any("resource", code="invalid_target")
        audience = _AUDIENCES.get(self.get("audience") or Audience.GATEWAY.value)
        if audience is None:
            refuse("invalid_target", f"The audience must be one of {', '.join(sorted(_AUDIENCES))}.")
        return audience


def client_proof(form: Form, authorization: str | None) -> ClientProof | None:
    """How the client proves itself: client_secret_basic, client_secret_post (RFC 6749, section 2.3.1) or
    private_key_jwt (RFC 7523, section 2.2); None: it does not.

    Raises RequestInvalid where it does so in two ways, CredentialInvalid where one is malformed.
    """
    by_header = authorization is not None
    by_secret, by_assertion = bool(form.get("client_secret")), bool(form.get("client_assertion"))
    if by_header + by_secret + by_assertion > 1:
        refuse("invalid_request", "A client proves itself in one way only.")
    client_id = form.get("client_id")
    if authorization is not None:
        proof = _basic(authorization)
        if client_id and client_id != proof.client_id:
            refuse("invalid_request", "The parameter client_id names another client than the header.")
        return proof
    if by_assertion:
        if form.get("client_assertion_type") != ASSERTION_TYPE:
            refuse("invalid_request", f"The parameter client_assertion_type must be {ASSERTION_TYPE}.")
        assertion = form.get("client_assertion")
        return ClientProof(client_id or _subject(assertion), assertion=assertion)
    if by_secret:
        return ClientProof(form.require("client_id"), form.get("client_secret"))
    return None


def required_proof(form: Form, authorization: str | None) -> ClientProof:
    """As `client_proof`. Raises CredentialMissing where there is none."""
    proof = client_proof(form, authorization)
    if proof is None:
        raise CredentialMissing(
            "The client does not prove itself.",
            hint="Send client_id and client_secret, HTTP Basic, or a client_assertion.",
            metadata={OAUTH_ERROR: "invalid_client"},
        )
    return proof


def _basic(authorization: str) -> ClientProof:
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        _wrong("The authorization scheme must be Basic.")
    try:
        text = base64.b64decode(encoded.strip(), validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        text = ""
    name, colon, secret = text.partition(":")
    if not colon:
        _wrong("The Basic credential is malformed.")
    try:
        # both are form-encoded before they are joined (RFC 6749, section 2.3.1)
        proof = ClientProof(unquote_plus(name, errors="strict"), unquote_plus(secret, errors="strict"))
    except ValueError:
        proof = None
    if proof is None or not proof.client_id or not proof.secret:
        _wrong("The Basic credential is malformed.")
    return proof


def _subject(assertion: str) -> str:
    """Whom an assertion says it is from; auth verifies it."""
    segments = assertion.split(".", 3)
    subject = None
    if len(segments) == 3:
        try:
            subject = parse_object(decode(segments[1]), "payload").get("sub")
        except Malformed:
            subject = None
    if not isinstance(subject, str) or _CLIENT_ID.fullmatch(subject) is None:
        _wrong("The client's assertion is malformed.")
    return subject


def _wrong(why: str) -> NoReturn:
    raise CredentialInvalid(why, hint="", metadata={OAUTH_ERROR: "invalid_client"})
