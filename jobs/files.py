"""Files of the API, as the store knows them: whose, what for, how long. Uploaded ones lie on a disk (`api.openai.spool`).

The output and the errors of an OpenAI batch are files too, whose lines are made of the batch's results when they are
read; their records are written when it is finalized, and go with its results.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from jobs import keys
from jobs.connections import redis_errors
from jobs.cursors import Asked, page
from jobs.errors import NotFound

#: Seconds that the input of a batch is kept unless its uploader says otherwise.
BATCH_KEPT_S = 30 * 86_400

Part = Literal["output", "error"]

_OF_BATCH = re.compile(r"file-([0-9a-f]{24})-(output|error)")


@dataclass(frozen=True, slots=True)
class File:
    """A file; times in unix seconds, `expires_at` None for one that is kept until it is deleted."""

    file_id: str
    tenant: str
    purpose: str
    filename: str
    bytes: int
    created_at: float
    expires_at: float | None = None


def new_id() -> str:
    """The id of a file that is uploaded."""
    return f"file-{secrets.token_hex(12)}"


def id_of(batch_id: str, part: Part) -> str:
    """The id of a file of a batch."""
    return f"file-{batch_id}-{part}"


def batch_of(file_id: str) -> tuple[str, Part] | None:
    """The batch whose file this is, and which; None for an uploaded one."""
    found = _OF_BATCH.fullmatch(file_id)
    return None if found is None else (found[1], cast("Part", found[2]))


def add(client: Any, file_id: str, tenant: str, purpose: str, filename: str, size: int, kept_s: float | None) -> File:
    """Makes an uploaded file known, whose content lies where it belongs; kept for so long, None: until it is deleted."""
    with redis_errors():
        seconds, micros = client.time()
        now = seconds + micros / 1e6
        expires_at = None if kept_s is None else now + kept_s
        fields = {"tenant": tenant, "purpose": purpose, "filename": filename, "bytes": size, "created_at": repr(now)}
        pipe = client.pipeline(transaction=True)
        pipe.hset(keys.file(file_id), mapping=fields)
        if expires_at is not None:
            pipe.hset(keys.file(file_id), "expires_at", repr(expires_at))
            pipe.zadd(keys.FILES, {file_id: expires_at})
        for name in (keys.tenant_files(tenant), keys.tenant_files(tenant, purpose)):
            pipe.zadd(name, {file_id: now})
        pipe.sadd(keys.TENANTS, tenant)
        pipe.execute()
    return File(file_id, tenant, purpose, filename, size, now, expires_at)


def get(client: Any, tenant: str, file_id: str) -> File:
    """A tenant's file. Raises `NotFound`, also once it has expired."""
    found = _read(client, tenant, [file_id])[0]
    if found is None:
        raise NotFound(f"there is no file {file_id}")
    return found


def files_page(client: Any, tenant: str, asked: Asked, purpose: str = "") -> tuple[list[File], bool]:
    """A tenant's files, of one purpose or of any, and whether there are more. Raises `NotFound` for an unknown cursor."""
    return page(client, keys.tenant_files(tenant, purpose), asked, lambda ids: _read(client, tenant, ids))


def delete(client: Any, file_id: str) -> bool:
    """Forgets a file; its list still names it for a while. Returns whether it was there."""
    with redis_errors():
        pipe = client.pipeline(transaction=True)
        pipe.delete(keys.file(file_id))
        pipe.zrem(keys.FILES, file_id)
        return bool(pipe.execute()[0])


def expired(client: Any, most: int) -> list[str]:
    """Ids of uploaded files whose time is over, the oldest first."""
    with redis_errors():
        seconds, _ = client.time()
        return [raw.decode() for raw in client.zrangebyscore(keys.FILES, "-inf", seconds, start=0, num=most)]


def known(client: Any, file_ids: Sequence[str]) -> set[str]:
    """Those of the ids that the store knows."""
    with redis_errors():
        pipe = client.pipeline(transaction=False)
        for file_id in file_ids:
            pipe.exists(keys.file(file_id))
        return {file_id for file_id, there in zip(file_ids, pipe.execute(), strict=True) if there}


def _read(client: Any, tenant: str, ids: Sequence[str]) -> list[File | None]:
    with redis_errors():
        pipe = client.pipeline(transaction=True)
        for file_id in ids:
            pipe.hgetall(keys.file(file_id))
        pipe.time()
        *replies, (seconds, _) = pipe.execute()
    return [_file(file_id, tenant, raw, seconds) for file_id, raw in zip(ids, replies, strict=True)]


def _file(file_id: str, tenant: str, raw: dict[bytes, bytes], now: int) -> File | None:
    record = {name.decode(): value.decode() for name, value in raw.items()}
    if not record or record["tenant"] != tenant:
        return None
    expires_at = float(record["expires_at"]) if "expires_at" in record else None
    if expires_at is not None and expires_at <= now:
        return None
    return File(
        file_id,
        tenant,
        record["purpose"],
        record["filename"],
        int(record["bytes"]),
        float(record["created_at"]),
        expires_at,
    )
