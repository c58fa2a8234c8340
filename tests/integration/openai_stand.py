"""What tests of OpenAI's files and batches say over plain HTTP, and wait for."""

from __future__ import annotations

import json
from typing import Any

import httpx

from jobs import leases
from jobs.leases import Job
from jobs.requests import CHAT
from tests.integration.api_stand import lines
from tests.integration.store_model import ending, run
from tests.waiting import wait_for

#: Those of a batch that is over.
ENDED = ("completed", "failed", "expired", "cancelled")


def upload(http: httpx.Client, content: bytes, filename: str = "in.jsonl", **fields: str) -> httpx.Response:
    """The answer to an upload, as the input of a batch unless told otherwise."""
    return http.post("/v1/files", files={"file": (filename, content)}, data={"purpose": "batch", **fields})


def input_of(http: httpx.Client, *items: Any) -> str:
    """The id of an input file of these lines."""
    response = upload(http, lines(*items))
    assert response.status_code == 200, response.text
    file_id: str = response.json()["id"]
    return file_id


def create(http: httpx.Client, key: str | None = None, **body: Any) -> httpx.Response:
    """The answer to a new batch of this body."""
    told = {"endpoint": CHAT, "completion_window": "24h", **body}
    return http.post("/v1/batches", json=told, headers={} if key is None else {"Idempotency-Key": key})


def submit(http: httpx.Client, *items: Any, **body: Any) -> str:
    """The id of a new batch of these lines."""
    response = create(http, input_file_id=input_of(http, *items), **body)
    assert response.status_code == 200, response.text
    batch: str = response.json()["id"]
    return batch


def get(http: httpx.Client, batch: str) -> dict[str, Any]:
    """A look at a batch."""
    response = http.get(f"/v1/batches/{batch}")
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    counts = found["request_counts"]
    assert counts["completed"] + counts["failed"] <= counts["total"]
    return found


def seen(http: httpx.Client, batch: str, *statuses: str) -> dict[str, Any]:
    """The batch once it has one of these."""

    def look() -> dict[str, Any]:
        found = get(http, batch)
        return found if found["status"] in statuses else {}

    return wait_for(look, what=f"a batch that is {statuses}")


def ended(http: httpx.Client, batch: str, status: str = "completed") -> dict[str, Any]:
    """The batch once it is over, which must be in this way; all of it is accounted for."""
    found = seen(http, batch, *ENDED)
    assert found["status"] == status, found
    counts = found["request_counts"]
    assert counts["completed"] + counts["failed"] == counts["total"]
    output, errors = content(http, found["output_file_id"]), content(http, found["error_file_id"])
    assert (len(output), len(errors)) == (counts["completed"], counts["failed"])
    return found


def content(http: httpx.Client, file_id: str | None, **params: int) -> list[dict[str, Any]]:
    """The lines of a batch's file, none where there is no file; no custom id comes twice."""
    if file_id is None:
        return []
    response = http.get(f"/v1/files/{file_id}/content", params=params)
    assert response.status_code == 200, response.text
    found = [json.loads(text) for text in response.text.splitlines()]
    assert len({row["custom_id"] for row in found}) == len(found)
    return found


class Played:
    """Jobs of a batch on the interactive lane, which nobody serves but the test."""

    def __init__(self, url: str, batch: str) -> None:
        self._url = url
        self._batch = batch.removeprefix("batch_")
        self._jobs: dict[int, Job] = {}

    def end(self, letter: str, *indexes: int) -> None:
        """Ends these, one after the other."""

        def claimed() -> bool:
            if not self._jobs.keys() >= set(indexes):
                found = run(lambda client: leases.claim(client, "w", "interactive", [""], 1_000, 600.0), self._url)
                self._jobs.update({job.index: job for job in found if job.batch_id == self._batch})
            return self._jobs.keys() >= set(indexes)

        wait_for(claimed, what=f"jobs {indexes} to claim")
        ends = [ending(self._jobs.pop(index), letter) for index in indexes]
        assert run(lambda client: leases.finish(client, self._batch, ends), self._url) == ["ended"] * len(ends)
