"""What a message of `mimoq.complete` says of its task beside what was asked for: who waits for it, and what comes after it.

What goes wrong: a field holds what Celery never puts there, and Celery would stumble over it once the answer is paid for. So
each is looked at when the message comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery.canvas import Signature
from kombu.utils.json import dumps

#: What a message says that is not kept: what was asked for is the job's, the rest is this delivery's.
_NOT_KEPT = frozenset(
    (
        "args",
        "kwargs",
        "argsrepr",
        "kwargsrepr",
        "hostname",
        "properties",
        "delivery_info",
        "eta",
        "expires",
        "timelimit",
        "time_limit",
        "soft_time_limit",
        "lang",
        "task",
        "is_eager",
        "called_directly",
        "loglevel",
        "logfile",
        "utc",
        "_children",
    )
)


def signature_of(context: Any) -> str:
    """What Celery needs to know of a task at its end, as JSON."""
    return str(dumps({name: value for name, value in vars(context).items() if name not in _NOT_KEPT}))


def mend(context: Any) -> list[str]:
    """Takes from a task's context what Celery can't have written, so that the rest of it holds; returns the names."""
    wrong = [
        name for name, right in _RIGHT.items() if (value := vars(context).get(name)) is not None and not right(value)
    ]
    vars(context).update(dict.fromkeys(wrong))
    return wrong


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return isinstance(value, int)


def _list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _signature(value: Any) -> bool:
    if not (_mapping(value) and _text(value.get("task")) and _mapping(value.get("options"))):
        return False
    kind = value.get("subtask_type")
    known = kind is None or (_text(kind) and kind in Signature.TYPES)
    return known and _list(value.get("args", ())) and _mapping(value.get("kwargs", {}))


def _signatures(value: Any) -> bool:
    return _list(value) and all(map(_signature, value))


def _links(value: Any) -> bool:
    return _list(value) and all(_text(item) or _signature(item) for item in value)


_RIGHT = {
    "root_id": _text,
    "parent_id": _text,
    "correlation_id": _text,
    "reply_to": _text,
    "shadow": _text,
    "group": _text,
    "group_index": _number,
    "chord": _signature,
    "chain": _signatures,
    "callbacks": _links,
    "errbacks": _links,
    "retries": _number,
    "replaced_task_nesting": _number,
    "ignore_result": _number,
    "headers": _mapping,
    "stamps": _mapping,
    "stamped_headers": _list,
}
