"""OpenAI's guide to its Batch API, step by step, as one script; nothing in it is of mimoq.

`OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=<token> python examples/openai_batch.py` runs it here. It needs the
`openai` package.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from openai import OpenAI

MODEL = "MaaS_Mimo_V2.5_20260423"
QUESTIONS = ("Hello world!", "What is a queue?", "Name three colours.")

client = OpenAI()


def prepare(path: Path) -> None:
    """1. Prepare the batch file: one request a line."""
    with path.open("w", encoding="utf-8") as file:
        for number, question in enumerate(QUESTIONS, 1):
            request = {
                "custom_id": f"request-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": MODEL,
                    "messages": [
                        {"role": "system", "content": "You are a helpful assistant."},
                        {"role": "user", "content": question},
                    ],
                    "max_tokens": 1000,
                },
            }
            file.write(json.dumps(request) + "\n")


def main() -> None:
    """2. Upload it, 3. create the batch, 4. check its status, 5. retrieve the results, 6. list batches."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batchinput.jsonl"
        prepare(path)
        with path.open("rb") as file:
            batch_input_file = client.files.create(file=file, purpose="batch")
    print("file", batch_input_file.filename, batch_input_file.purpose, batch_input_file.status)

    batch = client.batches.create(
        input_file_id=batch_input_file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"description": "nightly eval job"},
    )
    print("batch", batch.object, batch.endpoint, batch.completion_window, batch.status, batch.metadata)

    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(1)
        batch = client.batches.retrieve(batch.id)
    print("status", batch.status)
    if batch.request_counts is not None:
        counts = batch.request_counts
        print("counts", counts.total, counts.completed, counts.failed)
    if batch.errors is not None and batch.errors.data is not None:
        for error in batch.errors.data:
            print("error", error.line, error.code, error.message)

    if batch.output_file_id is not None:
        for line in client.files.content(batch.output_file_id).text.splitlines():
            result = json.loads(line)
            response = result["response"]
            answer = response["body"]["choices"][0]["message"]["content"]
            print("result", result["custom_id"], response["status_code"], json.dumps(answer))
    if batch.error_file_id is not None:
        for line in client.files.content(batch.error_file_id).text.splitlines():
            print("failed", line)

    for known in client.batches.list(limit=10):
        print("known", known.id == batch.id, known.status)


if __name__ == "__main__":
    main()
