"""The key of an answer: everything that can change the answer counts, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import fields, replace

from services.gateway.cache import directives
from services.gateway.cache.keys import answer_key, has_one_answer
from services.gateway.generation import Message, Prompt, Role, Sampling, ValidGeneration

TEXTS = st.text(max_size=5)
PROMPTS = st.one_of(
    st.builds(Prompt, text=TEXTS),
    st.builds(
        Prompt,
        messages=st.lists(
            st.builds(
                Message,
                role=st.sampled_from(Role),
                parts=st.lists(TEXTS, max_size=2).map(tuple),
                name=TEXTS,
            ),
            min_size=1,
            max_size=3,
        ).map(tuple),
    ),
)
NUMBERS = st.none() | st.floats(0, 2, width=32)
SAMPLINGS = st.builds(
    Sampling,
    seed=st.integers(0, 2**64 - 1),
    temperature=NUMBERS,
    top_p=NUMBERS,
    top_k=st.none() | st.integers(0, 2**31),
    min_p=NUMBERS,
    presence_penalty=NUMBERS,
    frequency_penalty=NUMBERS,
    repetition_penalty=NUMBERS,
    logit_bias=st.lists(
        st.tuples(st.integers(0, 9), st.floats(-100, 100, width=32).map(lambda bias: bias + 0.0)), max_size=2
    ).map(tuple),
)
REQUESTS = st.builds(
    ValidGeneration,
    model=st.sampled_from(["a", "b"]),
    prompt=PROMPTS,
    sampling=SAMPLINGS,
    max_tokens=st.none() | st.integers(0, 3),
    stop=st.lists(TEXTS, max_size=2).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 3), max_size=2).map(tuple),
    n=st.integers(1, 3),
    logprobs=st.booleans(),
    top_logprobs=st.integers(0, 3),
    ignore_eos=st.booleans(),
)
WITHOUT_EFFECT = {"end_user", "labels", "is_job"}


@settings(max_examples=150, deadline=None)
@given(REQUESTS, REQUESTS)
def test_requests_that_differ_in_any_field_have_different_keys(
    one: ValidGeneration, other: ValidGeneration
) -> None:
    assert (answer_key("t", one) == answer_key("t", other)) == (one == other)
    assert answer_key("t", one) == answer_key("t", replace(one))
    assert answer_key("t", one) != answer_key("u", one)
    # Two requests at random differ in much; now in one thing alone.
    for field in fields(ValidGeneration):
        changed = replace(one, **{field.name: getattr(other, field.name)})
        assert (answer_key("t", one) == answer_key("t", changed)) == (one == changed), field.name
    for field in fields(Sampling):
        sampling = replace(one.sampling, **{field.name: getattr(other.sampling, field.name)})
        changed = replace(one, sampling=sampling)
        assert (answer_key("t", one) == answer_key("t", changed)) == (one == changed), field.name


@settings(max_examples=50, deadline=None)
@given(REQUESTS, TEXTS)
def test_what_stays_at_the_gateway_does_not_count(request: ValidGeneration, text: str) -> None:
    assert answer_key("t", request) == answer_key("t", replace(request, end_user=text, labels={"k": text}))


def test_a_field_that_is_added_has_to_be_thought_of() -> None:
    """It is in the key by itself; the strategies above have to vary it too."""
    covered = {"model", "prompt", "sampling", "max_tokens", "stop", "stop_token_ids", "n", "logprobs"}
    covered |= {"top_logprobs", "ignore_eos"}
    assert {field.name for field in fields(ValidGeneration)} == covered | WITHOUT_EFFECT


def test_texts_do_not_run_into_each_other() -> None:
    def keyed(*parts: str, tenant: str = "t", name: str = "") -> bytes:
        message = Message(Role.USER, parts, name)
        return answer_key(tenant, ValidGeneration("m", Prompt((message,)), Sampling(1)))

    assert (
        len({keyed("ab"), keyed("a", "b"), keyed("", "ab"), keyed("b", name="a"), keyed("b", tenant="ta")})
        == 5
    )


def test_an_assigned_seed_counts_only_as_being_none_of_the_caller() -> None:
    def keyed(seed: int, assigned: bool) -> bytes:
        sampling = Sampling(seed, temperature=0, seed_is_assigned=assigned)
        return answer_key("t", ValidGeneration("m", Prompt(text="x"), sampling))

    assert keyed(1, True) == keyed(2, True)
    assert len({keyed(0, True), keyed(0, False), keyed(1, False)}) == 3


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1), True),
        (Sampling(1, temperature=1.5), True),
        (Sampling(1, seed_is_assigned=True), False),  # the model's own default is no 0
        (Sampling(1, temperature=1e-9, seed_is_assigned=True), False),
        (Sampling(1, temperature=0, seed_is_assigned=True), True),
    ],
)
def test_which_requests_have_one_answer(sampling: Sampling, expected: bool) -> None:
    assert has_one_answer(ValidGeneration("m", Prompt(text="x"), sampling)) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", directives.Directives()),
        ("no-transform, max-stale=9", directives.Directives()),
        ("No-Cache , no-store", directives.Directives(no_cache=True, no_store=True)),
        ('max-age="5",only-if-cached', directives.Directives(only_if_cached=True, max_age_s=5)),
        ("max-age=-1", directives.Directives(max_age_s=0)),
        ("max-age=", directives.Directives(max_age_s=0)),
        ("max-age=" + "9" * 5000, directives.Directives(max_age_s=999_999_999)),
        (",,=,;no-cache", directives.Directives()),
    ],
)
def test_the_words_of_cache_control(text: str, expected: directives.Directives) -> None:
    assert directives.parse(text) == expected
