"""The grammar of names: all that is valid is accepted, and nothing else. [distribution-spec: Pulling manifests]"""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.digest import Digest
from storage.errors import InvalidDigest, InvalidName
from storage.names import NAME_LIMIT, TAG_LIMIT, parse_reference, parse_repository, parse_tag, referrers_tag
from tests.storage.test_digest import digests

#: As the specification prints them.
SPEC_NAME = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*")
SPEC_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")

parts = st.text("abcxyz0189", min_size=1, max_size=8)
separators = st.sampled_from([".", "_", "__", "-", "--", "-----"])
components = st.builds(
    lambda first, rest: first + "".join(separator + part for separator, part in rest),
    parts,
    st.lists(st.tuples(separators, parts), max_size=3),
)
names = st.lists(components, min_size=1, max_size=6).map("/".join).filter(lambda name: len(name) <= NAME_LIMIT)
tags = st.from_regex(SPEC_TAG, fullmatch=True)


@given(names)
def test_a_valid_name_is_accepted_as_it_is(name: str) -> None:
    assert SPEC_NAME.fullmatch(name)
    assert parse_repository(name) == name


@given(tags)
def test_a_valid_tag_is_accepted_as_it_is(tag: str) -> None:
    assert parse_tag(tag) == tag
    assert parse_reference(tag) == tag


@given(names, st.sampled_from(["{}/", "/{}", "{}//b", "{}.", ".{}", "{}-", "-{}", "_{}", "{}_", "{}..b", "{}___b"]))
def test_a_name_with_a_separator_out_of_place_is_refused(name: str, frame: str) -> None:
    with pytest.raises(InvalidName):
        parse_repository(frame.format(name))


@given(names, st.integers(0, NAME_LIMIT), st.sampled_from("ABZ:@ \n\t\x00\\?#%+*~äſК٣é\u200b"))
def test_a_name_with_a_foreign_letter_is_refused(name: str, position: int, letter: str) -> None:
    with pytest.raises(InvalidName):
        parse_repository(name[:position] + letter + name[position:])


@given(tags, st.sampled_from(["{}\n", "{} ", " {}", "{}/", ".{}", "-{}", "{}@", "{}+", "{}ä", "{}\x00", "{}٣"]))
def test_a_mutated_tag_is_refused(tag: str, frame: str) -> None:
    with pytest.raises(InvalidName):
        parse_tag(frame.format(tag[: TAG_LIMIT - 1]))


@pytest.mark.parametrize("text", ["", "/", ".", "..", "a/../b", "a/./b", "A", "a//b", "a/", "a\n", "%61"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(InvalidName):
        parse_repository(text)


def test_a_name_has_a_longest_length() -> None:
    assert parse_repository("a" * NAME_LIMIT)
    assert parse_repository("a/" * 127 + "a")
    for text in ("a" * (NAME_LIMIT + 1), "a/" * 128 + "a"):
        with pytest.raises(InvalidName, match="255"):
            parse_repository(text)


def test_a_tag_has_a_longest_length() -> None:
    assert parse_tag("T" * TAG_LIMIT)
    with pytest.raises(InvalidName, match="128"):
        parse_tag("T" * (TAG_LIMIT + 1))


@given(st.text())
def test_any_text_is_a_name_exactly_where_the_specification_says_so(text: str) -> None:
    try:
        assert parse_repository(text) == text
        is_name = True
    except InvalidName:
        is_name = False
    assert is_name == (SPEC_NAME.fullmatch(text) is not None and len(text) <= NAME_LIMIT)


@given(st.text())
def test_any_text_is_a_tag_exactly_where_the_specification_says_so(text: str) -> None:
    try:
        assert parse_tag(text) == text
        is_tag = True
    except InvalidName:
        is_tag = False
    assert is_tag == (SPEC_TAG.fullmatch(text) is not None)


@given(st.text() | digests | tags)
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    refusal = InvalidDigest if ":" in text else InvalidName
    with contextlib.suppress(refusal):
        reference = parse_reference(text)
        assert str(reference) == text
        assert isinstance(reference, Digest) == (":" in text)


@pytest.mark.parametrize("text", ["a-" * 100_000, "a_" * 126 + "A", "a--" * 84 + "-", "-" * 254 + "A"])
def test_a_name_made_to_be_slow_is_refused_like_any_other(text: str) -> None:
    with pytest.raises(InvalidName) as raised:
        parse_repository(text)
    assert len(str(raised.value)) < 1000


@given(digests)
def test_the_tag_of_referrers_is_a_tag(text: str) -> None:
    digest = Digest.parse(text)
    tag = referrers_tag(digest)
    assert parse_tag(tag) == tag
    algorithm, _, hexadecimal = tag.partition("-")
    assert (algorithm, hexadecimal) == (digest.algorithm, digest.hex[:64])
