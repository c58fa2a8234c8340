"""What is submitted: requests whose prompts are natural text, as a file or as they are made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.requests import CHAT
from ops.bench.corpus import Corpus

PROMPT_BYTES = 500
#: Of the text that the simulator cuts its answers from.
ANSWERS_BYTES = 500_000
#: Seeds: what is asked, and what is answered.
ASKED, ANSWERED = 8, 9


def bodies(count: int) -> Iterator[dict[str, Any]]:
    """Bodies of chat requests, the same for every caller."""
    corpus = Corpus(ASKED)
    return (corpus.body(PROMPT_BYTES) for _ in range(count))


def custom_id(number: int) -> str:
    """Ten characters."""
    return f"row{number:07d}"


def lines(count: int, ids: bool) -> Iterator[str]:
    """The same as lines of a file: bare bodies, or with custom ids as OpenAI's batches have them."""
    for number, body in enumerate(bodies(count)):
        if ids:
            line = {"custom_id": custom_id(number), "method": "POST", "url": CHAT, "body": body}
            yield json.dumps(line) + "\n"
        else:
            yield json.dumps(body) + "\n"


def written(path: Path, count: int, ids: bool = False) -> Path:
    """A file of them."""
    with path.open("w") as file:
        file.writelines(lines(count, ids))
    return path


def answers_text(path: Path) -> Path:
    """A file that the simulator may cut its answers from."""
    path.write_text(Corpus(ANSWERED).text(ANSWERS_BYTES))
    return path
