"""Submitting: requests are staged in pipelined blocks, then made a batch in one step.

What goes wrong here: a submit that is cut anywhere leaves no batch, or a whole one; what it staged expires. A store that is
away is waited for, and nothing is written twice: a block that is staged again overwrites itself, and creating is
idempotent by batch id. What a restarted server has forgotten of the staged requests is found out before the batch is made.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jobs import keys
from jobs.blocks import encode_blocks
from jobs.connections import redis_errors
from jobs.errors import Conflict, StoreUnavailable, Unwanted, UsageError
from jobs.patience import Patience
from jobs.requests import Request
from jobs.results import NO_USAGE, Usage
from jobs.room import Room
from jobs.scripts import Script

#: Seconds that staged requests live on after the last sign of life of their submit.
STAGING_TTL_S = 900
#: Seconds after which a slow submit gives such a sign, between two requests.
SIGN_S = 30.0
#: Bytes written to Redis in one pipeline while submitting.
PIPELINE_BYTES = 1_000_000

_create = Script("create")
_heard = Script("heard")


@dataclass(frozen=True, slots=True)
class NewBatch:
    """What a batch is created with; times in seconds, `deadline_at` in unix seconds by the server's clock instead.

    `identity` is a digest of what makes a repeated submit the same one, '' for nothing; `content` the digest of what must
    be the same then, made from the requests and `beside` where it is ''. `tenant` is whose it is at the API, `protocol`
    the one it came by (`openai`, `anthropic`, '' for ours); `metadata` a JSON object and `callback` the address that is told
    of its end, '' for none. `alike` names who may make this call again without an idempotency key, '' for nobody; `again`
    says that this is such a call, which finds what it made before. `followup` is what each job's end brings about, as
    `jobs.followups` writes it, '' for nothing.
    """

    batch_id: str = field(default_factory=lambda: secrets.token_hex(12))
    lane: str = "bulk"
    label: str = ""
    slice_size: int = 50
    ttl_s: int = 30 * 86_400
    max_attempts: int | None = None
    deadline_s: float | None = None
    deadline_at: float | None = None
    identity: str = ""
    content: str = ""
    beside: str = ""
    answered: bytes = b""
    answered_usage: Usage = NO_USAGE
    metadata: str = ""
    tenant: str = ""
    callback: str = ""
    protocol: str = ""
    alike: str = ""
    again: bool = False
    followup: str = field(default="", repr=False)

    def further(self) -> list[Any]:
        """Fields of the record that not every batch has, name and value in turn."""
        optional = {
            "max_attempts": self.max_attempts,
            "metadata": self.metadata,
            "callback": self.callback,
            "protocol": self.protocol,
            "followup": self.followup,
        }
        further: list[Any] = []
        for name, value in optional.items():
            if value:
                further += [name, value]
        return further


class Submitted(NamedTuple):
    """What came of a submit; `created` is False where a batch of the same identity and content was there."""

    batch_id: str
    jobs: int
    created: bool


class Submission:
    """One submit, from its first request to its batch."""

    def __init__(
        self,
        client: Any,
        new: NewBatch,
        patience: Patience,
        room: Room,
        progress: Callable[[int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._new = new
        self._patience = patience
        self._room = room
        self._progress = progress
        self._clock = clock
        self._staged = keys.staged(new.batch_id, secrets.token_hex(6))
        self._digest = hashlib.blake2b(new.beside.encode(), digest_size=16)
        self._content = new.content
        self._jobs = 0
        self._fields = 0
        self._size = 0
        self._block: dict[str, bytes] = {}
        self._sign_at = 0.0
        self._tries = 0
        self._made = False

    def submit(self, requests: Iterable[Request]) -> Submitted:
        """Does it all. Raises `Conflict`, `NoRoom`, `Unwanted` or `StoreUnavailable`; nothing is left behind then."""
        if (self._new.identity or self._new.alike) and not self._new.content:
            requests = self._digested(requests)
        there = self._patience.call(self._look) if self._new.identity else None
        if there is not None:
            # Nothing need be written, only counted and compared.
            self._jobs = sum(1 for _ in requests)
            self._content = self._new.content or self._digest.hexdigest()
            self._refuse_empty()
            batch_id, content = there
            return self._submitted("exists" if content == self._content else "conflict", batch_id)
        with self._unstaging():
            self._stage(requests)
            if self._new.identity or self._new.alike:
                self._content = self._new.content or self._digest.hexdigest()
            try:
                word, batch_id = self._patience.call(self._create)
            except StoreUnavailable as error:
                if not self._patience.unanswered:
                    raise
                raise StoreUnavailable(
                    f"{error}; whether batch {self._new.batch_id} was submitted shows when Redis answers again "
                    f"(`mimoq status {self._new.batch_id}`)"
                ) from None
            # A batch of this very id that is there when it is asked for again was made the time before.
            self._made = word == "created" or (self._tries > 1 and batch_id == self._new.batch_id)
        return self._submitted(word, batch_id)

    def _submitted(self, word: str, batch_id: str) -> Submitted:
        if word == "conflict":
            raise Conflict(
                f"this idempotency key stands for batch {batch_id}, which has other requests; nothing was submitted: "
                "give these a key of their own"
            )
        if word == "unstaged":
            raise StoreUnavailable(
                "Redis has lost requests while they were being written (they expired, or it was restarted without its "
                "last writes); nothing was submitted: submit again"
            )
        if word == "unwanted":
            raise Unwanted("the batch was cancelled before it was made")
        if self._made:
            self._room.added(self._jobs)
        return Submitted(batch_id, self._jobs, self._made)

    def _refuse_empty(self) -> None:
        if not self._jobs:
            raise UsageError("a batch needs at least one request")

    def _digested(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The requests, their digest taken on the way: of all that is stored of each."""
        for request in requests:
            custom_id = request.custom_id
            name = b"" if custom_id is None else custom_id.encode()
            sizes = b"%d %d" % (-1 if custom_id is None else len(name), len(request.body))
            self._digest.update(b"\n".join((request.endpoint.encode(), sizes, name, request.body)))
            yield request

    def _look(self) -> tuple[str, str] | None:
        """The batch of this identity that is still kept, with its content."""
        with redis_errors():
            found = self._client.get(keys.identity(self._new.identity))
            if found is None:
                return None
            content = self._client.hget(keys.batch(found.decode()), "content")
        return None if content is None else (found.decode(), content.decode())

    # -- staging

    def _stage(self, requests: Iterable[Request]) -> None:
        self._sign_at = self._clock() + SIGN_S
        for fields, count in encode_blocks(self._signing(requests), self._new.slice_size):
            self._jobs += count
            self._block |= fields
            self._size += sum(map(len, fields.values()))
            if self._size > PIPELINE_BYTES:
                self._flush()
                if self._progress is not None:
                    self._progress(self._jobs)
        self._refuse_empty()
        self._flush()

    def _signing(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The requests; while they come slowly, signs of life are given, so that what is staged does not expire."""
        for request in requests:
            if self._clock() >= self._sign_at:
                self._flush()
            yield request

    def _flush(self) -> None:
        """Writes what has been made into blocks, if there is room for it and for the answers."""
        self._patience.call(self._write)
        self._fields += len(self._block)
        self._block = {}
        self._size = 0
        self._sign_at = self._clock() + SIGN_S

    def _write(self) -> None:
        answered = self._new.answered[: self._jobs].replace(b"\0", b"")
        self._room.check(self._jobs - len(answered), self._size)
        with redis_errors():
            # One transaction: a producer that dies in the middle of sending it leaves no key that never expires.
            pipe = self._client.pipeline(transaction=True)
            if self._block:
                pipe.hset(self._staged, mapping=self._block)
            pipe.expire(self._staged, STAGING_TTL_S)
            pipe.execute()

    @contextmanager
    def _unstaging(self) -> Iterator[None]:
        """Frees at the end what was staged and is no batch's: at once where Redis answers, be it out of memory."""
        import redis

        try:
            yield
        finally:
            if not self._made and not self._patience.unanswered:
                with suppress(redis.RedisError):
                    self._client.unlink(self._staged)

    # -- creating

    def _create(self) -> tuple[str, str]:
        new = self._new
        further = new.further()
        if new.answered_usage != NO_USAGE:
            for name in Usage.__struct_fields__:
                further += [name, getattr(new.answered_usage, name)]
        arguments = [
            new.batch_id,
            new.lane,
            new.label,
            self._jobs,
            new.slice_size,
            new.identity,
            self._content,
            new.ttl_s,
            "" if new.deadline_s is None else new.deadline_s,
            new.tenant,
            new.answered,
            new.answered.count(b"s"),
            new.answered.count(b"f"),
            self._fields,
            made_digest(new.alike, self._content),
            "1" if new.again else "",
            "" if new.deadline_at is None else new.deadline_at,
            new.protocol,
            *further,
        ]
        self._tries += 1
        with redis_errors():
            reply = _create(self._client, [keys.PREFIX, self._staged], arguments)
        return reply[0].decode(), reply[1].decode() if len(reply) > 1 else new.batch_id


def made_digest(alike: str, content: str) -> str:
    """What a call that is made again shares with itself; '' for one that nobody makes again."""
    if not alike:
        return ""
    return hashlib.blake2b(f"{alike}\n{content}".encode(), digest_size=16).hexdigest()


def heard(client: Any, batch_id: str) -> None:
    """Whoever made the batch has heard of it: no call made again finds it any more."""
    with redis_errors():
        _heard(client, [keys.PREFIX], [batch_id])
