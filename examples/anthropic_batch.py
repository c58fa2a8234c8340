"""Anthropic's guide to its Message Batches API, step by step, as one script; nothing in it is of mimoq.

`ANTHROPIC_BASE_URL=http://127.0.0.1:8000 ANTHROPIC_API_KEY=<token> python examples/anthropic_batch.py` runs it here. It
needs the `anthropic` package.
"""

from __future__ import annotations

import json
import time

import anthropic
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming
from anthropic.types.messages.batch_create_params import Request

MODEL = "MaaS_Mimo_V2.5_20260423"
QUESTIONS = {"my-first-request": "Hello, world", "my-second-request": "Hi again, friend"}

client = anthropic.Anthropic()


def main() -> None:
    """1. Create the batch, 2. track it, 3. list batches, 4. retrieve the results."""
    message_batch = client.messages.batches.create(
        requests=[
            Request(
                custom_id=custom_id,
                params=MessageCreateParamsNonStreaming(
                    model=MODEL, max_tokens=1024, messages=[{"role": "user", "content": question}]
                ),
            )
            for custom_id, question in QUESTIONS.items()
        ]
    )
    print("batch", message_batch.type, message_batch.processing_status, message_batch.request_counts.processing)
    print("results url", message_batch.results_url)

    while message_batch.processing_status != "ended":
        time.sleep(1)
        message_batch = client.messages.batches.retrieve(message_batch.id)
    counts = message_batch.request_counts
    print("status", message_batch.processing_status)
    print("counts", counts.succeeded, counts.errored, counts.canceled, counts.expired, counts.processing)

    for known in client.messages.batches.list(limit=20):
        print("known", known.id == message_batch.id, known.processing_status)

    # The results come as a stream, in any order.
    for result in client.messages.batches.results(message_batch.id):
        match result.result.type:
            case "succeeded":
                message = result.result.message
                answer = "".join(block.text for block in message.content if block.type == "text")
                print("success", result.custom_id, message.stop_reason, json.dumps(answer))
            case "errored":
                error = result.result.error.error
                print("error", result.custom_id, error.type, error.message)
            case "expired":
                print("request expired", result.custom_id)
            case "canceled":
                print("request canceled", result.custom_id)


if __name__ == "__main__":
    main()
