"""Streamed answers, joined: bytes of server-sent events in, one response body in the non-stream shape out. No I/O.

What can go wrong shows in the joiner's attributes, never as an exception: an `error` event, data that is not JSON
(`invalid`), a body over the limit (`too_large`), a stream that ends early (`complete` stays false). What follows the
end of a complete answer is ignored: it was paid for, and it is whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import msgspec

from worker.answers import NOT_JSON

MAX_ANSWER_BYTES = 32 * 1024 * 1024

# A token of four letters travels in an event of 300 bytes.
_FRAMING = 16

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode

# Strings that every fragment may repeat; all others grow by fragments.
_WHOLE = frozenset(("id", "type", "role"))


class EventParser:
    """Bytes, cut anywhere, into events by the rules of the HTML standard (9.2.6), names and data only."""

    __slots__ = ("_cr", "_data", "_event", "_first", "_tail")

    def __init__(self) -> None:
        self._tail: list[bytes] = []
        self._data: list[bytes] = []
        self._event = b""
        self._cr = False
        self._first = True

    def feed(self, chunk: bytes) -> list[tuple[bytes, bytes]]:
        """The `(name, data)` of every event that these bytes complete."""
        if self._cr and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._cr = False
        if b"\r" in chunk:
            self._cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if b"\n" not in chunk:
            self._tail.append(chunk)
            return []
        lines = chunk.split(b"\n")
        if self._tail:
            self._tail.append(lines[0])
            lines[0] = b"".join(self._tail)
        self._tail = [lines.pop()]
        return self._read(lines)

    def close(self) -> list[tuple[bytes, bytes]]:
        """The last event, where its blank line is missing; the standard drops it, real servers forget the line."""
        return self._read([b"".join(self._tail), b""])

    def _read(self, lines: list[bytes]) -> list[tuple[bytes, bytes]]:
        if self._first:
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
            self._first = False
        events = []
        data = self._data
        for line in lines:
            if line[:5] == b"data:":
                data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line:
                if data:
                    events.append((self._event, data[0] if len(data) == 1 else b"\n".join(data)))
                    data.clear()
                self._event = b""
            elif line[:6] == b"event:":
                self._event = line[6:].removeprefix(b" ")
        return events


class Joiner(ABC):
    """What both protocols share: `feed` bytes, then `finish`."""

    def __init__(self, limit: int = MAX_ANSWER_BYTES) -> None:
        self.error: bytes | None = None
        """The error object that came inside the stream, as a body."""
        self.invalid = False
        """Something came that is no event of this protocol."""
        self.complete = False
        """The answer is whole."""
        self.done = False
        """Nothing more is to come."""
        self.too_large = False
        self._limit = limit
        self._event_room = limit
        self._room = limit * _FRAMING
        self._parser = EventParser()
        self._body: dict[str, Any] = {}

    @property
    def stopped(self) -> bool:
        """Reading on is of no use."""
        return self.done or self.invalid or self.too_large or self.error is not None

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the stream, however they are cut."""
        self._room -= len(chunk)
        self._event_room -= len(chunk)
        for name, data in self._parser.feed(chunk):
            self._event_room = self._limit
            if self.stopped:
                return
            self._event(name, data)
        self.too_large = self.too_large or self._room < 0 or self._event_room < 0

    def finish(self) -> bytes:
        """The joined body, as a non-stream call would have given it; of a cut stream, what had come."""
        if not self.stopped:
            for name, data in self._parser.close():
                self._event(name, data, last=True)
        try:
            body = _encode(self._joined())
        except NOT_JSON:
            self.invalid = True
            return b"{}"
        self.too_large = self.too_large or len(body) > self._limit
        return body

    def _event(self, name: bytes, data: bytes, last: bool = False) -> None:
        if not data:
            return
        if data == b"[DONE]":
            self.done = self.complete = True
            return
        try:
            event = _decode(data)
            if name == b"error" or event.get("error") is not None:
                self._failed(event if event.get("error") is not None else {"error": event})
            else:
                self._take(event, name)
        except (*NOT_JSON, AttributeError, TypeError, KeyError):
            if name == b"error":
                self._failed({"error": {"message": data.decode(errors="replace")}})
            else:
                # Half an event at the very end is a cut, not nonsense.
                self.invalid = not (last or self.complete)

    def _failed(self, error: object) -> None:
        self.done = self.complete
        self.error = None if self.complete else _encode(error)

    @abstractmethod
    def _take(self, event: dict[str, Any], name: bytes) -> None:
        """Takes one event in."""

    @abstractmethod
    def _joined(self) -> object:
        """The response that the events make."""


class ChatJoiner(Joiner):
    """Joins `chat.completion.chunk` events into one `chat.completion`."""

    def __init__(self, limit: int = MAX_ANSWER_BYTES) -> None:
        super().__init__(limit)
        self._choices: dict[int, dict[str, Any]] = {}

    def _take(self, event: dict[str, Any], name: bytes) -> None:
        body = self._body
        ended = False
        for key, value in event.items():
            if key == "choices":
                for choice in value or ():
                    ended = self._choice(choice) or ended
            elif value is not None or key not in body:
                body[key] = value
        if ended:
            self.complete = all(choice["finish_reason"] is not None for choice in self._choices.values())

    def _choice(self, chunk: dict[str, Any]) -> bool:
        index = _int(chunk.get("index") or 0)
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = {"index": index, "message": {"role": "assistant"}, "finish_reason": None}
        for key, value in chunk.items():
            if key == "delta":
                if value:
                    merge(choice["message"], value)
            elif key == "logprobs":
                merge(choice, {key: value})
            elif value is not None or key not in choice:
                choice[key] = value
        return chunk.get("finish_reason") is not None

    def _joined(self) -> object:
        choices = [self._choices[index] for index in sorted(self._choices)]
        for choice in choices:
            choice["message"].setdefault("content", None)
        body = {**self._body, "object": "chat.completion", "choices": choices}
        if "usage" in body:
            body["usage"] = body.pop("usage")  # last, where it stands in a non-stream answer
        return joined(body)


class MessagesJoiner(Joiner):
    """Joins the events of Anthropic's Messages protocol into one `message`."""

    def __init__(self, limit: int = MAX_ANSWER_BYTES) -> None:
        super().__init__(limit)
        self._blocks: dict[int, dict[str, Any]] = {}

    def _take(self, event: dict[str, Any], name: bytes) -> None:
        match event.get("type") or name.decode():
            case "content_block_delta":
                delta = event["delta"]
                block = self._blocks[event["index"]]
                if "citation" in delta:
                    block["citations"] = [*(block.get("citations") or ()), delta["citation"]]
                else:
                    merge(block, {key: value for key, value in delta.items() if key != "type"})
            case "content_block_start":
                self._blocks[_int(event["index"])] = dict(event["content_block"])
            case "message_start":
                self._body = dict(event["message"])
            case "message_delta":
                self._body.update(event["delta"])
                self._body["usage"] = {**(self._body.get("usage") or {}), **(event.get("usage") or {})}
                self.complete = self._body.get("stop_reason") is not None
            case "message_stop":
                self.done = self.complete = True

    def _joined(self) -> object:
        body = joined(self._body)
        content = [joined(self._blocks[index]) for index in sorted(self._blocks)]
        for block in content:
            if isinstance(text := block.pop("partial_json", None), str):
                block["input"] = _input(text) if text else block.get("input") or {}
        if content or "content" in body:
            body["content"] = content or body["content"]
        return body


def _input(text: str) -> object:
    """A tool's input; where the token limit cut it, the text as it came."""
    try:
        return _decode(text)
    except NOT_JSON:
        return text


def _int(value: object) -> int:
    if type(value) is not int:
        raise TypeError
    return value


class Pieces(list[str]):
    """A string in the making."""


class Indexed(dict[int, dict[str, Any]]):
    """A list in the making whose elements come in fragments, each with its `index`."""


def merge(into: dict[str, Any], delta: dict[str, Any]) -> None:
    """Merge a fragment: strings and lists grow, objects merge, indexed elements merge by index, others are replaced."""
    for key, value in delta.items():
        old = into.get(key)
        if type(value) is str:
            if type(old) is Pieces:
                old.append(value)
            elif key in _WHOLE:
                into[key] = value or old
            else:
                into[key] = Pieces((old, value)) if type(old) is str else Pieces((value,))
        elif value is None:
            into.setdefault(key, None)
        elif type(value) is dict:
            if type(old) is not dict:
                into[key] = old = {}
            merge(old, value)
        elif type(value) is list and (key == "tool_calls" or type(old) is Indexed):
            if type(old) is not Indexed:
                into[key] = old = Indexed()
            for item in value:
                merge(old.setdefault(_index(item, old), {}), item)
        elif type(value) is list and type(old) is list:
            old.extend(value)
        else:
            into[key] = value


def _index(item: dict[str, Any], old: Indexed) -> int:
    """Where a fragment belongs; without an index one with an id begins anew, one without goes on with the last."""
    index = item.get("index")
    if type(index) is int:
        return index
    return len(old) if "id" in item else max(len(old) - 1, 0)


def joined(value: Any) -> Any:
    """What was merged, as plain JSON values."""
    kind = type(value)
    if kind is Pieces:
        return "".join(value)
    if kind is Indexed:
        return [{key: joined(item) for key, item in value[index].items() if key != "index"} for index in sorted(value)]
    if kind is dict:
        return {key: joined(item) for key, item in value.items()}
    if kind is list:
        return [joined(item) for item in value]
    return value
