"""Links: the task of somebody's Celery app that gets a job's id once the job has ended, whichever way."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from jobs.errors import UsageError

#: How queues begin that are this project's own: what comes to them is no link.
OWN = "mimoq."

#: Bytes of the JSON of a link's keyword arguments: they lie in the record of a batch.
KWARGS_BYTES = 4_096
#: Names of tasks and queues: dotted, and nothing that a line of a log could trip over.
NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.:/@-]{0,254}$"

_name = re.compile(NAME, re.ASCII)
_encode = msgspec.json.Encoder().encode


class Link(msgspec.Struct, frozen=True, tag="link", omit_defaults=True, forbid_unknown_fields=True):
    """A task by its name, the queue it is sent to (None: MIMOQ_DEFAULT_QUEUE), and what it gets beside the job's id."""

    task: str
    queue: str | None = None
    kwargs: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"Link({self.task!r}, queue={self.queue!r})"


def make_link(given: Link | Mapping[str, Any]) -> Link:
    """A link from `{"task": name, "queue": name, "kwargs": {...}}`, the last two optional. Raises `UsageError`."""
    try:
        link = given if isinstance(given, Link) else msgspec.convert(dict(given), Link)
        size = len(_encode(link.kwargs))
    except (msgspec.MsgspecError, TypeError, ValueError):  # whose message may repeat a value
        raise UsageError("link: must be {'task': name, 'queue': name, 'kwargs': {...}}, in JSON's types") from None
    for name in (link.task, link.queue):
        if name is not None and not _name.match(name):
            raise UsageError("link: task and queue are names of up to 255 letters, digits and _.:/@-")
    if link.queue is not None and link.queue.startswith(OWN):
        raise UsageError(f"link: queues that begin with {OWN} are mimoq's own")
    if size > KWARGS_BYTES:
        raise UsageError(f"link: kwargs take {size:,} bytes as JSON, {KWARGS_BYTES:,} are allowed")
    return link


def written(given: Link | Mapping[str, Any] | None) -> str:
    """A link as a batch's record holds it, '' for none. Raises `UsageError`."""
    return "" if given is None else _encode(make_link(given)).decode()


def allowed(entries: Collection[str], link: Link) -> Link | None:
    """A link as a list of `task` and `task@queue` lets it go, None where it does not; a task may also be `prefix.*`.

    It goes to the queue of its entry. One that names another does not go, nor one that names none where there are several.
    """
    listed = (entry.partition("@") for entry in entries)
    queues = {queue or None for name, _, queue in listed if _matches(name, link.task)}
    if link.queue in queues:
        return link
    if link.queue is None and len(queues) == 1:
        return msgspec.structs.replace(link, queue=queues.pop())
    return None


def _matches(name: str, task: str) -> bool:
    return task == name or (name.endswith(".*") and task.startswith(name[:-1]))
