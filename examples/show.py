"""Shows the answers of a finished run: `python examples/show.py answers.jsonl`. It needs the standard library only.

A line of the file is `{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}`; the body is the
upstream's whole answer, of chat completions or of messages.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any


def shorten(text: str, length: int = 76) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def read(body: dict[str, Any]) -> tuple[str, str, str]:
    """`(answer, reasoning, usage)` of one response, whichever of the two endpoints it came from."""
    usage = body.get("usage") or {}
    if "choices" in body:
        message = body["choices"][0]["message"]
        calls = [call["function"] for call in message.get("tool_calls") or []]
        answer = message.get("content") or ", ".join(f"{call['name']}({call['arguments']})" for call in calls)
        reasoning = message.get("reasoning_content") or ""
        asked, answered = usage.get("prompt_tokens"), usage.get("completion_tokens")
    else:
        parts = body["content"]
        answer = " ".join(part["text"] for part in parts if part["type"] == "text")
        reasoning = " ".join(part["thinking"] for part in parts if part["type"] == "thinking")
        asked, answered = usage.get("input_tokens"), usage.get("output_tokens")
    return answer, reasoning, f"{asked} tokens in, {answered} out"


def main(path: Path) -> None:
    """Prints three lines a row."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a sign shows a question mark
    with path.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            answer, reasoning, usage = read(row["response"]["body"])
            print(f"{row['custom_id']} ({usage})")
            if reasoning:
                print(f"  reasoning  {shorten(reasoning)}")
            print(f"  answer     {shorten(answer)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
