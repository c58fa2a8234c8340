"""Seeing to follow-ups: links are sent, Celery tasks ended, in threads beside the engine.

Every worker process does it, for whatever job; the one that ended a pipeline's job at once, the others look each second.

What goes wrong: broker or backend away, and it is tried again after a wait that grows to ten minutes, for about a day. The
worker dies, and its lease on the follow-up runs out. So each is seen to at least once.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import structlog
from celery import Celery
from celery.exceptions import TaskRevokedError

from jobs import followups
from jobs.errors import StoreUnavailable
from jobs.followups import Ending, FollowUp
from jobs.links import Link
from jobs.results import NOT_KEPT, StoredResult
from jobs.states import JobState, split_job_id
from jobs.store import Store
from worker.endings import Endings, Unended

#: Seconds between two looks, unless something is known to be due.
LOOK_S = 1.0
#: Follow-ups taken in one step, and threads that see to them.
TAKEN = 16
THREADS = 4
#: Seconds before the next try, doubled with each up to the most; and tries in all, which take a day.
FIRST_WAIT_S = 1.0
MOST_WAIT_S = 600.0
MOST_TRIES = 150
#: Seconds that a process told to end gives what its last jobs have brought about.
LAST_S = 2.0

log = structlog.get_logger("worker.followups")

#: Sends an event of a task: its type, the task's id, further fields.
Tell = Callable[..., None]


class FollowUps:
    """One process's part in it. `tell` sends events of tasks, `count` counts what came of one: done, failed, given_up."""

    def __init__(self, app: Celery, store: Store, tell: Tell, count: Callable[[str], None]) -> None:
        self._app = app
        self._store = store
        self._endings = Endings(app)
        self._tell = tell
        self._count = count
        self._wake = threading.Event()
        self._stop_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="mimoq-followups", daemon=True)

    def start(self) -> None:
        """Begins to look, in a thread of its own, unless it has begun."""
        if self._thread.ident is None:
            self._thread.start()

    def stir(self) -> None:
        """Something is due; from any thread."""
        self._wake.set()

    def stop(self) -> None:
        """Sees to what is due at this moment, for a moment, and ends. The rest is other workers', or the next one's."""
        self._stop_at = time.monotonic() + LAST_S
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(LAST_S)

    def _run(self) -> None:
        with ThreadPoolExecutor(THREADS, "mimoq-followup") as threads:
            while True:
                self._wake.wait(LOOK_S)
                self._wake.clear()
                last = self._stop_at
                try:
                    while last is None or time.monotonic() < last:
                        taken = followups.take(self._store.client, TAKEN)
                        if not taken:
                            break
                        list(threads.map(self._see_to, taken))
                except StoreUnavailable as error:
                    log.debug("followups_wait", error=type(error).__name__)
                except Exception as error:
                    log.error("followups_failed", error=type(error).__name__)
                if last is not None:
                    return

    def _see_to(self, item: FollowUp) -> None:
        try:
            self._follow(item)
        except Exception as error:
            # Of any library that carries it: its text may hold what was carried.
            self._failed(item, str(error) if isinstance(error, Unended) else type(error).__name__)
        else:
            followups.done(self._store.client, item)
            if item.what is not None and item.state is not None:
                self._count("done")

    def _failed(self, item: FollowUp, error: str) -> None:
        if item.tries >= MOST_TRIES:
            log.error("followup_given_up", job=item.job_id, error=error, tries=item.tries)
            self._count("given_up")
            followups.done(self._store.client, item)
            return
        wait_s = min(FIRST_WAIT_S * 2 ** (min(item.tries, 20) - 1), MOST_WAIT_S)
        log.warning("followup_failed", job=item.job_id, error=error, tries=item.tries, again_in_s=wait_s)
        self._count("failed")
        followups.later(self._store.client, item, wait_s)

    def _follow(self, item: FollowUp) -> None:
        """Does it, unless the job goes on after all, or is forgotten."""
        if item.state is None or item.what is None:
            return
        if isinstance(item.what, Link):
            self._send(item.what, item.job_id)
        else:
            self._end(item.what, item, item.state)

    def _send(self, link: Link, job_id: str) -> None:
        # The same id each time: who gets it twice can know.
        digest = hashlib.blake2b(f"{job_id}\n{link.task}".encode(), key=b"mimoq link", digest_size=12).hexdigest()
        self._app.send_task(link.task, args=[job_id], kwargs=link.kwargs, queue=link.queue, task_id=digest)

    def _end(self, ending: Ending, item: FollowUp, state: JobState) -> None:
        stored = None
        if state in (JobState.SUCCEEDED, JobState.FAILED):
            batch_id, index = split_job_id(item.job_id)
            (stored,) = self._store.results(batch_id, [index])
        answer = answer_of(state, stored)
        task = self._endings.end(ending.signature, answer, again=item.tries > 1)
        runtime = (
            round(sum(attempt.latency_s for attempt in stored.mimoq.attempts), 3) if stored and stored.mimoq else None
        )
        if not isinstance(answer, Exception):
            tokens = stored.mimoq.usage.total_tokens if stored and stored.mimoq else 0
            self._tell("task-succeeded", uuid=task, result=f"{tokens:,} tokens", runtime=runtime)
        elif isinstance(answer, TaskRevokedError):
            self._tell("task-revoked", uuid=task, terminated=False, signum=None, expired=state is JobState.EXPIRED)
        else:
            # Its code and status: the message may be the upstream's.
            said = f"RuntimeError({answer.args[0]!r}, {answer.args[1]!r})"
            self._tell("task-failed", uuid=task, exception=said, traceback="")


def answer_of(state: JobState, stored: StoredResult | None) -> Any:
    """What a task of a job that has ended so returns, or the exception that it raises."""
    if state in (JobState.CANCELLED, JobState.EXPIRED):
        return TaskRevokedError(state.value)
    if stored is None:
        return RuntimeError("result_expired", None, NOT_KEPT)
    if stored.status == "SUCCESS":
        return msgspec.json.decode(stored.result)
    failure = stored.mimoq.error if stored.mimoq is not None else None
    if failure is None:
        return RuntimeError("internal_error", None, "the job failed, and nothing tells why")
    return RuntimeError(failure.code, failure.status, failure.message)
