"""Tokens of the API: made, found, compared, revoked.

A token reads `mq_<id, 12 hex digits>_<secret, 43 characters>`. The store keeps its SHA-256 in place of its text, which
nobody can show again: 256 bits of chance need no slow hash. Every token sees the jobs of its tenant, and of no other;
a tenant outlives its tokens, so that one can be replaced by another.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from jobs import keys
from jobs.connections import redis_errors
from jobs.errors import Conflict, NotFound, UsageError

#: What a token may do: `submit` puts jobs in and cancels them, `read` looks at them.
SCOPES = ("submit", "read")
NAME_CHARACTERS = 64

_SHAPE = re.compile(r"mq_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")


class Token(msgspec.Struct, frozen=True):
    """What is known of a token; `rpm` is HTTP requests a minute, None where the setting holds, `created_at` unix seconds."""

    id: str
    name: str
    tenant: str
    digest: str
    scopes: list[str]
    rpm: int | None
    created_at: float

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in self.__struct_fields__ if name != "digest"]

    def __repr__(self) -> str:
        return f"Token({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"


def create(
    client: Any, name: str, scopes: Sequence[str] = SCOPES, rpm: int | None = None, tenant: str | None = None
) -> str:
    """A new token's text, which is kept nowhere; without `tenant` (that of another token), it is a tenant of its own.

    Raises `UsageError` for a name, scope or rpm that can't be, `Conflict` for a name in use, `StoreUnavailable`.
    """
    if not (0 < len(name) <= NAME_CHARACTERS and name.isprintable() and name == name.strip()):
        raise UsageError(
            f"a token's name has 1 to {NAME_CHARACTERS} printable characters, none of them a space at an end"
        )
    if not scopes:
        raise UsageError(f"a token needs a scope: {', '.join(SCOPES)}")
    for scope in scopes:
        if scope not in SCOPES:
            raise UsageError(f"scope {scope!r} is none of {', '.join(SCOPES)}")
    if rpm is not None and rpm < 1:
        raise UsageError("a token's rpm must be at least 1")
    ordered = [scope for scope in SCOPES if scope in scopes]
    token, text = _new(name, ordered, rpm, tenant)

    def add(tokens: list[Token], pipe: Any) -> None:
        if any(other.name == name for other in tokens):
            raise Conflict(f"a token named {name!r} is there already: choose another name, or revoke that one")
        pipe.hset(keys.TOKENS, token.id, msgspec.json.encode(token))

    _change(client, add)
    return text


def replace(client: Any, name: str) -> str:
    """The text of a new token in place of the one of that name, which is revoked: same tenant, scopes and rpm.

    Raises `NotFound` or `StoreUnavailable`.
    """
    text = ""

    def put(tokens: list[Token], pipe: Any) -> None:
        nonlocal text
        old = named(tokens, name)
        new, text = _new(old.name, old.scopes, old.rpm, old.tenant)
        pipe.hdel(keys.TOKENS, old.id)
        pipe.hset(keys.TOKENS, new.id, msgspec.json.encode(new))

    _change(client, put)
    return text


def revoke(client: Any, name_or_id: str) -> Token:
    """Forgets a token, and says which it was; jobs of its tenant stay. Raises `NotFound` or `StoreUnavailable`."""
    found: list[Token] = []

    def remove(tokens: list[Token], pipe: Any) -> None:
        found[:] = [named(tokens, name_or_id)]
        pipe.hdel(keys.TOKENS, found[0].id)

    _change(client, remove)
    return found[0]


def find(client: Any, token_id: str) -> Token | None:
    """The token of that id. Raises `StoreUnavailable`."""
    with redis_errors():
        raw = client.hget(keys.TOKENS, token_id)
    return None if raw is None else decode(raw)


def all_tokens(client: Any) -> list[Token]:
    """All there are, oldest first. Raises `StoreUnavailable`."""
    with redis_errors():
        return _all(client)


def decode(raw: bytes) -> Token:
    """A token as the store keeps it, the value of its id in `keys.TOKENS`."""
    return msgspec.json.decode(raw, type=Token)


def split(token: str) -> tuple[str, str] | None:
    """Id and secret of a token's text; None for what can't be a token, without a look at the store."""
    match = _SHAPE.fullmatch(token)
    return None if match is None else (match[1], match[2])


def matches(token: Token, given: str) -> bool:
    """Whether `given` is the whole text of the token; takes the same time however much of it is right."""
    return hmac.compare_digest(token.digest, _digest(given))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _new(name: str, scopes: list[str], rpm: int | None, tenant: str | None) -> tuple[Token, str]:
    token_id = secrets.token_hex(6)
    text = f"mq_{token_id}_{secrets.token_urlsafe(32)}"
    return Token(token_id, name, tenant or token_id, _digest(text), scopes, rpm, time.time()), text


def named(tokens: list[Token], name_or_id: str) -> Token:
    """The token of that name, or else of that id. Raises `NotFound`."""
    for token in tokens:
        if token.name == name_or_id:
            return token
    for token in tokens:
        if token.id == name_or_id:
            return token
    raise NotFound(f"there is no token {name_or_id!r}")


def _all(client: Any) -> list[Token]:
    return sorted(map(decode, client.hvals(keys.TOKENS)), key=lambda token: (token.created_at, token.id))


def _change(client: Any, change: Callable[[list[Token], Any], None]) -> None:
    """Has `change` see all tokens and say what is written; again where another has changed them meanwhile."""

    def attempt(pipe: Any) -> None:
        tokens = _all(pipe)
        pipe.multi()
        change(tokens, pipe)

    with redis_errors():
        client.transaction(attempt, keys.TOKENS)
