"""The body of `POST /v1/chat/completions` as the provider's page rules it, and the pieces both endpoints share.

The models only judge: what is sent upstream is the caller's own JSON, byte for byte. Fields that are not named here
pass (the provider adds fields). A list is judged up to its first bad element, so that one line of 20 MB cannot make
millions of errors. Union tags stand in `<>`, which tells them from field names where an error says its place.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from jobs.usual import MAX_TOKENS

# The default of a field that may be left out but must not be null.
ABSENT: Any = None

T = TypeVar("T")
ListOf = Annotated[list[T], Field(fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Temperature = Annotated[float, Field(ge=0, le=1.5)]
TopP = Annotated[float, Field(gt=0, le=1)]
Model = Annotated[str, Field(min_length=1)]


class Shape(BaseModel):
    """A JSON object: exact types (true is no number, 1.0 no integer), fields it does not name are left alone."""

    model_config = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True, defer_build=True
    )


def _text_or_list(value: object) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def _part_kind(value: object) -> str:
    return "<text>" if isinstance(value, dict) and value.get("type") == "text" else "<other>"


def _message_kind(value: object) -> str:
    return "<assistant>" if isinstance(value, dict) and value.get("role") == "assistant" else "<other>"


TEXT_OR_LIST = Discriminator(
    _text_or_list, custom_error_type="text_or_list", custom_error_message="must be a string or a list"
)


class CacheControl(Shape):
    type: Literal["ephemeral"] = Field(description="Only `ephemeral`.")


class TextPart(Shape):
    type: Literal["text"] = Field(description="`text`.")
    text: str = Field(description="The text.")
    cache_control: CacheControl | None = Field(None, description="`{type: ephemeral}`, or null.")


class OtherPart(Shape):
    type: str = Field(description="What the part is; every type but `text` is passed on unjudged.")
    cache_control: CacheControl | None = Field(None, description="`{type: ephemeral}`, or null.")


Part = Annotated[Annotated[TextPart, Tag("<text>")] | Annotated[OtherPart, Tag("<other>")], Discriminator(_part_kind)]
Content = Annotated[Annotated[str, Tag("<text>")] | Annotated[ListOf[Part], Tag("<list>")], TEXT_OR_LIST]
Stop = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[ListOf[str], Field(max_length=4), Tag("<list>")], TEXT_OR_LIST
]


class Message(Shape):
    role: Literal["developer", "system", "user", "assistant", "tool"] = Field(
        description="`developer`, `system`, `user`, `assistant` or `tool`."
    )
    content: Content = Field(description="A string, or a list of parts with a `type` each.")
    name: str | None = Field(None, description="A name of the speaker, a string.")
    tool_call_id: str | None = Field(None, description="Of role `tool`: the call that this answers, a string.")


class AssistantMessage(Shape):
    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
                {"required": ["tool_calls"], "properties": {"tool_calls": {"type": "array", "minItems": 1}}},
                {"required": ["reasoning_content"], "properties": {"reasoning_content": {"type": "string"}}},
            ]
        }
    )

    role: Literal["assistant"] = Field(description="`assistant`.")
    content: Content | None = Field(
        None, description="As of any message; null or left out only beside `tool_calls` or `reasoning_content`."
    )
    name: str | None = Field(None, description="A name of the speaker, a string.")
    reasoning_content: str | None = Field(None, description="The thinking of an earlier turn, a string.")
    tool_calls: ListOf[dict[str, Any]] | None = Field(None, description="The calls of an earlier turn, objects.")

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls and self.reasoning_content is None:
            raise PydanticCustomError("content_needed", "needs content, tool_calls or reasoning_content")
        return self


class Function(Shape):
    name: Annotated[str, Field(min_length=1, max_length=64)] = Field(description="1 to 64 characters.")
    description: str | None = Field(None, description="What it does, a string.")
    parameters: dict[str, Any] | None = Field(None, description="Its parameters as a JSON Schema, an object.")
    strict: bool | None = Field(None, description="Whether the schema is kept strictly, true or false.")


class Tool(Shape):
    type: Literal["function"] = Field(description="Only `function`.")
    function: Function = Field(description="The function, an object.")


class ResponseFormat(Shape):
    type: Literal["text"] = Field(description="Only `text`.")


class Thinking(Shape):
    type: Literal["enabled", "disabled"] = Field(description="`enabled` or `disabled`.")


class ChatBody(Shape):
    """The body of a chat completion; each field's description is its rule."""

    messages: Annotated[
        ListOf[
            Annotated[
                Annotated[Message, Tag("<other>")] | Annotated[AssistantMessage, Tag("<assistant>")],
                Discriminator(_message_kind),
            ]
        ],
        Field(min_length=1),
    ] = Field(description="A list of at least one message `{role, content, name?}`.")
    model: Model = Field(ABSENT, description="A string; where it is left out, the model of the settings.")
    frequency_penalty: Penalty | None = Field(0.0, description="A number from -2 to 2, or null.")
    presence_penalty: Penalty | None = Field(0.0, description="A number from -2 to 2, or null.")
    max_completion_tokens: Tokens | None = Field(32_768, description="An integer from 1 to 131072, or null.")
    response_format: ResponseFormat = Field(ABSENT, description="An object whose `type` is `text`.")
    stop: Stop | None = Field(None, description="A string, a list of at most 4 strings, or null.")
    stream: bool | None = Field(
        False, description="True, false or null. True: streamed upstream, and the joined response is stored."
    )
    thinking: Thinking = Field(ABSENT, description="An object whose `type` is `enabled` (the default) or `disabled`.")
    temperature: Temperature = Field(1.0, description="A number from 0 to 1.5.")
    top_p: TopP = Field(0.95, description="A number over 0, at most 1.")
    tool_choice: str = Field("auto", description="A string, `auto` unless given.")
    tools: ListOf[Tool] = Field(
        ABSENT, description="A list of `{type: function, function: {name, description?, parameters?, strict?}}`."
    )
