"""What is told of a request that breaks a rule: the place and the rule, and nothing of its texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

#: Said of what no UTF-8 can hold.
HALF_PAIR: Final = "holds half of a surrogate pair (\\ud800 to \\udfff), which no UTF-8 can hold"


def place(loc: tuple[int | str, ...]) -> str:
    """`messages[3].role` of a validation error; the tags of unions are no part of the way."""
    place = ""
    for step in loc:
        if isinstance(step, int):
            place += f"[{step}]"
        elif not step.startswith("<"):
            place += f".{step}" if place else step
    return place


_TYPES: Final = {
    "missing": "is missing",
    "string_type": "must be a string",
    "string_unicode": HALF_PAIR,
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "finite_number": "must be a finite number",
    # Rules that are written out in the models.
    "text_or_list": "must be a string or a list",
    "content_needed": "needs content, tool_calls or reasoning_content",
    "schema_needed": "needs an input_schema",
}
_BOUNDS: Final = {
    "greater_than": ("gt", "not over"),
    "greater_than_equal": ("ge", "under"),
    "less_than": ("lt", "not under"),
    "less_than_equal": ("le", "over"),
}


def message(error: ErrorDetails) -> str:
    """What is wrong, without any text of the request."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind in _BOUNDS:
        bound, relation = _BOUNDS[kind]
        # An integer of a thousand digits would fill the line.
        number = value if isinstance(value, float) or abs(value) < 10**20 else "the number"
        return f"{number} is {relation} {context[bound]:g}"
    if kind == "literal_error":
        names = context["expected"].replace("'", "").replace(" or ", ", ")
        return f"must be one of {names}" if ", " in names else f"must be {names}"
    if kind in ("too_long", "string_too_long"):
        things = "characters" if kind == "string_too_long" else "sequences" if "stop" in error["loc"] else "items"
        return f"has {len(value)} {things}, at most {context['max_length']} are allowed"
    if kind in ("too_short", "string_too_short"):
        return "is empty"
    return _TYPES.get(kind, "is not valid")


def unsupported(value: object, *supported: str) -> str:
    if not isinstance(value, str):
        return "must be a string"
    return f"{shown(value) or 'an empty string'} is not supported; use {' or '.join(supported)}"


def shown(name: str) -> str:
    """The first 60 characters of a name that a user gave, safe for a terminal."""
    return "".join(char if char.isprintable() else "?" for char in name[:60])
