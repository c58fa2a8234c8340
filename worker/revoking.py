"""Celery's `revoke`, which cancels jobs too: of a task that is written down there is no message left to be ignored.

Whatever its reason, each worker process does it; the first cancels the job, and its follow-up ends the task, with its chord
and errbacks told. Nothing that runs in a thread can be terminated, so `terminate` is the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from celery.worker import control


def register(cancel: Callable[[str], None]) -> None:
    """Has this process's workers call `cancel` with each id that is revoked."""

    @control.control_command(variadic="task_id", signature="[id1 [id2 [... [idN]]]]")  # type: ignore[untyped-decorator]
    def revoke(state: Any, task_id: Any, **_: Any) -> Any:
        """Revoke task by task id (or list of ids), and cancel its job."""
        told = control.revoke(state, task_id)
        ids = [task_id] if isinstance(task_id, str) else list(task_id or ())
        # Not in this thread, which takes messages in.
        threading.Thread(target=_each, args=(cancel, ids), name="mimoq-revoke", daemon=True).start()
        return told

    @control.control_command(args=[("signal", str)], variadic="task_id", signature="<signal> [id1 [id2 [... [idN]]]]")  # type: ignore[untyped-decorator]
    def terminate(state: Any, signal: Any, task_id: Any, **_: Any) -> Any:
        """Revoke task by task id (or list of ids), and cancel its job."""
        return revoke(state, task_id)


def _each(cancel: Callable[[str], None], ids: Iterable[Any]) -> None:
    for task_id in ids:
        if isinstance(task_id, str):
            cancel(task_id)
