"""From a submitted body to what the store is given: options checked, idempotency keys made into digests."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import msgspec
from fastapi import Header

from api.addresses import check_url
from api.auth import Caller
from api.core import Core
from api.problems import Problem
from api.shapes import LinkTo, NewBatchOptions, NewJob
from jobs.identity import key_identity
from jobs.links import Link, allowed, written
from jobs.submission import NewBatch

#: Characters of an idempotency key.
KEY_CHARS = 255
#: How that is documented; it is checked here, so that the answer is 400 as in other protocols.
_KEY_BOUNDS: dict[str, Any] = {"minLength": 1, "maxLength": KEY_CHARS}
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="The same key with the same body gives what it gave before, for as long as that is kept.",
        json_schema_extra=_KEY_BOUNDS,
    ),
]


def new_batch(
    core: Core,
    caller: Caller,
    options: NewJob | NewBatchOptions,
    key: str | None,
    content: str = "",
    beside: str = "",
) -> NewBatch:
    """What is made with these options; `content` and `beside` are digests of what must be the same when the key comes again.

    Raises a `Problem`, or `UsageError` for an address that can't be called back or a link that is too long.
    """
    if options.callback_url is not None:
        check_url(options.callback_url, core.settings)
    return NewBatch(
        lane=options.lane,
        label=core.label,
        slice_size=core.settings.slice_size,
        ttl_s=core.settings.result_ttl_s,
        max_attempts=options.max_attempts,
        deadline_s=options.deadline_s,
        identity=identity_of(caller, key) if key is not None else "",
        content=content if key is not None else "",
        beside=beside,
        metadata=msgspec.json.encode(options.metadata).decode() if options.metadata else "",
        tenant=caller.tenant,
        callback=options.callback_url or "",
        followup=_followup(core, options.link),
    )


def _followup(core: Core, link: LinkTo | None) -> str:
    """A link as the store keeps it. Raises a `Problem` where it is none that the operator allows."""
    if link is None:
        return ""
    goes = allowed(core.settings.api_link_tasks, Link(link.task, link.queue, link.kwargs or {}))
    if goes is None:
        raise Problem(
            403,
            "link_not_allowed",
            "link: this task may not be named here, or not with this queue; the operator allows some by "
            "MIMOQ_API_LINK_TASKS",
        )
    return written(goes)


def identity_of(caller: Caller, key: str) -> str:
    """What an idempotency key of a tenant stands under."""
    return key_identity(f"api\n{caller.tenant}\n{checked_key(key)}")


def checked_key(key: str) -> str:
    """An idempotency key. Raises a `Problem` where it is none."""
    if not 1 <= len(key) <= KEY_CHARS:
        raise Problem(400, "idempotency_key", f"Idempotency-Key: 1 to {KEY_CHARS} characters are allowed")
    return key


def digest(content: Any) -> str:
    """Of a decoded body: the order of its fields, and space between them, make no difference."""
    return hashlib.blake2b(msgspec.json.encode(content, order="sorted"), digest_size=16).hexdigest()
