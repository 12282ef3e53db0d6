"""What a job holds can be read by gateways alone, and only as what it was sealed for."""

from __future__ import annotations

import base64
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from services.gateway.jobs.ports import Seals
from services.gateway.jobs.seals import KEY_BYTES, MAX_KEYS, NoSeals, PayloadSeals, load
from services.mesh.app import StartError
from services.mesh.context import Identity
from services.mesh.errors import DataCorrupt, StateConflict
from services.mesh.jobs import JobKind, JobRequested, Sealed
from tests.framework.jobs import a_job, new_seals

CANARY = b"the canary sings"
NAMES = st.text(max_size=12)


@st.composite
def jobs(draw: st.DrawFn) -> JobRequested:
    return a_job(
        job_id=draw(NAMES),
        kind=draw(st.sampled_from(JobKind)),
        method=draw(NAMES),
        identity=Identity(draw(NAMES), draw(NAMES), draw(NAMES)),
    )


def bound(job: JobRequested, purpose: str) -> tuple[object, ...]:
    identity = job.identity
    return (
        job.job_id,
        job.kind,
        job.method,
        identity.tenant_id,
        identity.client_id,
        identity.key_id,
        purpose,
    )


@given(plaintext=st.binary(max_size=200), job=jobs(), purpose=NAMES)
def test_what_was_sealed_is_opened_again(plaintext: bytes, job: JobRequested, purpose: str) -> None:
    seals: Seals = new_seals()
    sealed = seals.seal(plaintext, job, purpose)
    assert seals.open(sealed, replace(job, labels={"other": "label"}, max_attempts=1), purpose) == plaintext
    assert len(sealed.ciphertext) == len(plaintext) + 12 + 16
    assert seals.seal(plaintext, job, purpose).ciphertext != sealed.ciphertext, "each has its own nonce"


@given(job=jobs(), purpose=NAMES, other=jobs(), other_purpose=NAMES)
def test_it_opens_for_nothing_else(
    job: JobRequested, purpose: str, other: JobRequested, other_purpose: str
) -> None:
    seals = new_seals()
    sealed = seals.seal(CANARY, job, purpose)
    if bound(job, purpose) == bound(other, other_purpose):
        assert seals.open(sealed, other, other_purpose) == CANARY
        return
    with pytest.raises(DataCorrupt):
        seals.open(sealed, other, other_purpose)


def test_each_thing_that_it_is_bound_to_counts() -> None:
    seals, job = new_seals(), a_job()
    sealed = seals.seal(CANARY, job, "request")
    alice = job.identity
    others = [
        replace(job, job_id="x"),
        replace(job, method="x"),
        replace(job, kind=JobKind.WEBHOOK),
        replace(job, identity=structs.replace(alice, tenant_id="x")),
        replace(job, identity=structs.replace(alice, client_id="x")),
        replace(job, identity=structs.replace(alice, key_id="x")),
        # The same letters, cut elsewhere.
        replace(job, identity=structs.replace(alice, client_id="alicekey_1", key_id="")),
    ]
    for other in others:
        with pytest.raises(DataCorrupt):
            seals.open(sealed, other, "request")
    with pytest.raises(DataCorrupt):
        seals.open(sealed, job, "result")


def test_each_bit_counts() -> None:
    seals, job = new_seals(), a_job()
    sealed = seals.seal(CANARY, job, "request")
    for place in range(len(sealed.ciphertext) * 8):
        changed = bytearray(sealed.ciphertext)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(DataCorrupt):
            seals.open(replace(sealed, ciphertext=bytes(changed)), job, "request")
    for length in range(len(sealed.ciphertext)):
        with pytest.raises(DataCorrupt):
            seals.open(replace(sealed, ciphertext=sealed.ciphertext[:length]), job, "request")


def test_keys_follow_one_another() -> None:
    old, new, job = os.urandom(KEY_BYTES), os.urandom(KEY_BYTES), a_job()
    before, known, after = PayloadSeals([old]), PayloadSeals([old, new]), PayloadSeals([new, old])
    sealed_before, sealed_after = before.seal(CANARY, job, "request"), after.seal(CANARY, job, "request")
    assert sealed_before.key_id != sealed_after.key_id
    for seals in (known, after):
        assert seals.open(sealed_before, job, "request") == CANARY
        assert seals.open(sealed_after, job, "request") == CANARY
    for seals, sealed in ((before, sealed_after), (PayloadSeals([new]), sealed_before)):
        with pytest.raises(DataCorrupt, match="does not have"):
            seals.open(sealed, job, "request")
    with pytest.raises(DataCorrupt):
        after.open(replace(sealed_before, key_id=sealed_after.key_id), job, "request")


@settings(max_examples=50)
@given(tenant=NAMES, purpose=NAMES, text=st.binary(max_size=50), other=st.binary(max_size=50))
def test_a_hash_is_the_same_for_the_same_only(tenant: str, purpose: str, text: bytes, other: bytes) -> None:
    key = os.urandom(KEY_BYTES)
    seals, again = PayloadSeals([key]), PayloadSeals([key])
    found = seals.keyed_hash(tenant, purpose, text)
    assert len(found) == 32
    assert again.keyed_hash(tenant, purpose, text) == found
    assert (seals.keyed_hash(tenant, purpose, other) == found) == (text == other)
    assert seals.keyed_hash(tenant + "x", purpose, text) != found
    assert seals.keyed_hash(tenant, purpose + "x", text) != found
    assert new_seals().keyed_hash(tenant, purpose, text) != found


def test_nothing_that_is_printed_holds_the_text() -> None:
    seals, job = new_seals(), a_job()
    sealed = seals.seal(CANARY, job, "request")
    shown = repr(sealed) + repr(replace(job, request=sealed)) + repr(seals)
    assert "canary" not in shown
    assert CANARY not in sealed.ciphertext


def key_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "payload-key"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_a_file_of_keys(tmp_path: Path) -> None:
    first, second = os.urandom(KEY_BYTES), os.urandom(KEY_BYTES)
    lines = [base64.b64encode(key).decode() for key in (first, second)]
    sealed = PayloadSeals([second]).seal(CANARY, a_job(), "result")
    loaded = load(key_file(tmp_path, f"{lines[0]}\n\n{lines[1]}\n", 0o440))
    assert loaded.open(sealed, a_job(), "result") == CANARY
    assert PayloadSeals([first]).open(loaded.seal(b"x", a_job(), "request"), a_job(), "request") == b"x"


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("", 0o600, "1 to 16"),
        ("no base64!", 0o600, "base64"),
        (base64.b64encode(b"canary" * 3).decode(), 0o600, "32 bytes"),
        ("\n".join([base64.b64encode(bytes(KEY_BYTES)).decode()] * (MAX_KEYS + 1)), 0o600, "1 to 16"),
        (base64.b64encode(bytes(KEY_BYTES)).decode(), 0o644, "chmod 600"),
    ],
)
def test_a_wrong_file_is_refused_without_a_word_of_it(
    tmp_path: Path, text: str, mode: int, said: str
) -> None:
    with pytest.raises(StartError, match=said) as refused:
        load(key_file(tmp_path, text, mode))
    assert not text or text not in str(refused.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="No such file"):
        load(tmp_path / "none")


def test_a_deployment_without_a_key_offers_no_jobs() -> None:
    seals = load(None)
    assert isinstance(seals, NoSeals)
    for refuse in (
        lambda: seals.seal(CANARY, a_job(), "request"),
        lambda: seals.open(Sealed("", b""), a_job(), "request"),
        lambda: seals.keyed_hash("acme", "p", CANARY),
    ):
        with pytest.raises(StateConflict) as refused:
            refuse()
        assert "LLMOS_GATEWAY_PAYLOAD_KEY_FILE" in refused.value.hint
