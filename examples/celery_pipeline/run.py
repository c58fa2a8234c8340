"""Runs a chain, a group and a chord: `python run.py`, beside `celery -A app worker` and `mimoq worker`."""

from __future__ import annotations

from app import ask, complete, mine, text, tokens
from celery import chain, chord, group

TOPICS = ("rain", "rivers", "bridges")
#: Seconds that anything may take.
PATIENCE_S = 120


def main() -> None:
    # The request is made by one task, answered by the model, read by another.
    said = chain(mine(ask, "rain"), complete(), mine(text)).apply_async()
    print("chain:", said.get(timeout=PATIENCE_S))

    # Several at once.
    requests = [{"prompt": f"One word about {topic}."} for topic in TOPICS]
    answers = group(complete(request) for request in requests).apply_async().get(timeout=PATIENCE_S)
    print("group:", [answer["choices"][0]["finish_reason"] for answer in answers])

    # Several at once, and one task that gets all the answers.
    total = chord((complete(request, max_attempts=3) for request in requests), mine(tokens)).apply_async()
    print("chord:", total.get(timeout=PATIENCE_S), "tokens")

    # A call that can't be: the exception has a code, a status and a message.
    failed = complete({"messages": "none"}).apply_async()
    try:
        failed.get(timeout=PATIENCE_S)
    except RuntimeError as error:
        code, status, _ = error.args
        print("refused:", code, status)


if __name__ == "__main__":
    main()
