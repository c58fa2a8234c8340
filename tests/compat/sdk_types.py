"""The official SDKs' own types as a strict contract. The SDKs themselves build objects of whatever comes, unchecked."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, TypeVar

import pydantic

Model = TypeVar("Model", bound=pydantic.BaseModel)


def exact(model: type[Model], raw: Any, besides: Collection[str] = ()) -> Model:
    """The object that decoded JSON stands for. Raises AssertionError unless it fits the SDK's type to the letter.

    Every field that must be there is, each value is of the declared type (nothing is converted but texts into times), and no
    field is there that the type does not name, however deep; but for those `besides`, as `result.error.code`.
    """
    try:
        made = model.model_validate_json(json.dumps(raw), strict=True)
    except pydantic.ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise AssertionError(f"no {model.__name__}: {told}") from None
    unnamed = [place for place in _unnamed(made, "") if place not in besides]
    assert not unnamed, f"{model.__name__} does not name {', '.join(unnamed)}"
    return made


def _unnamed(value: Any, place: str) -> list[str]:
    """Where a validated value holds fields that its types do not name: pydantic has chosen which of a union it is."""
    if isinstance(value, pydantic.BaseModel):
        inside = [(f"{place}.{name}", getattr(value, name)) for name in type(value).model_fields]
        own = [f"{place}.{name}" for name in value.model_extra or ()]
    elif isinstance(value, dict):
        inside, own = [(f"{place}.{name}", inner) for name, inner in value.items()], []
    elif isinstance(value, list):
        inside, own = [(f"{place}[{index}]", inner) for index, inner in enumerate(value)], []
    else:
        return []
    return [name.lstrip(".") for name in own] + [name for way, inner in inside for name in _unnamed(inner, way)]
