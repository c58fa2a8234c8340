"""Tokens of the API, as far as no store is needed: their shape, their comparison, what shows of them."""

from __future__ import annotations

import hashlib

import pytest
from rich.pretty import pretty_repr

from jobs.tokens import SCOPES, Token, matches, split

TEXT = "mq_0123456789ab_" + "s" * 43
TOKEN = Token("0123456789ab", "ci", "0123456789ab", hashlib.sha256(TEXT.encode()).hexdigest(), [*SCOPES], 60, 1.0)


def test_a_token_is_split_into_id_and_secret() -> None:
    assert split(TEXT) == ("0123456789ab", "s" * 43)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mq_",
        "sk-other",
        TEXT[:-1],
        TEXT + "s",
        TEXT + "\n",
        " " + TEXT,
        TEXT.replace("mq_", "MQ_"),
        TEXT.replace("ab_", "AB_"),
        TEXT.replace("0123", "٠١٢٣"),
        TEXT[:-1] + "ß",
        TEXT[:-1] + "\0",
        TEXT[:-1] + "=",
    ],
)
def test_what_is_no_token_is_not_looked_for(text: str) -> None:
    assert split(text) is None


def test_only_the_whole_text_matches() -> None:
    assert matches(TOKEN, TEXT)
    for wrong in ("", TEXT[:-1], TEXT + "s", TEXT.upper(), TOKEN.digest, "s" * 43, "\udcff", TEXT.replace("0", "1")):
        assert not matches(TOKEN, wrong)


def test_no_form_of_a_token_shows_its_digest() -> None:
    for shown in (repr(TOKEN), str(TOKEN), f"{TOKEN}", pretty_repr(TOKEN), pretty_repr([TOKEN])):
        assert TOKEN.digest not in shown
        assert "'ci'" in shown
