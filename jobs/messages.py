"""The body of `POST /v1/messages`: Anthropic's Messages API within the limits of the provider's page."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from jobs.chat import (
    ABSENT,
    TEXT_OR_LIST,
    CacheControl,
    Content,
    ListOf,
    Model,
    Shape,
    Temperature,
    TextPart,
    Tokens,
    TopP,
)

System = Annotated[Annotated[str, Tag("<text>")] | Annotated[ListOf[TextPart], Tag("<list>")], TEXT_OR_LIST]


class Turn(Shape):
    role: Literal["user", "assistant"] = Field(description="`user` or `assistant`; the same may speak twice in a row.")
    content: Content = Field(description="A string, or a list of parts with a `type` each.")


class MessagesTool(Shape):
    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["input_schema"], "properties": {"input_schema": {"type": "object"}}},
                {"required": ["type"], "properties": {"type": {"type": "string", "not": {"const": "custom"}}}},
            ]
        }
    )

    name: Annotated[str, Field(min_length=1, max_length=128)] = Field(description="1 to 128 characters.")
    type: str | None = Field(None, description="`custom` unless given; others are the server's own tools.")
    description: str | None = Field(None, description="What it does, a string.")
    input_schema: dict[str, Any] | None = Field(
        None, description="Its input as a JSON Schema, an object; needed unless `type` names a server's tool."
    )
    cache_control: CacheControl | None = Field(None, description="`{type: ephemeral}`, or null.")

    @model_validator(mode="after")
    def _has_a_schema(self) -> MessagesTool:
        if self.input_schema is None and self.type in (None, "custom"):
            raise PydanticCustomError("schema_needed", "needs an input_schema")
        return self


class ToolChoice(Shape):
    type: Literal["auto", "any", "tool", "none"] = Field(description="`auto`, `any`, `tool` or `none`.")
    name: str | None = Field(None, description="Of type `tool`: its name, a string.")


class MessagesThinking(Shape):
    type: Literal["enabled", "disabled"] = Field(description="`enabled` or `disabled`.")
    budget_tokens: Tokens | None = Field(None, description="An integer from 1 to 131072, or null.")


class MessagesBody(Shape):
    """The body of a message; each field's description is its rule."""

    messages: Annotated[ListOf[Turn], Field(min_length=1)] = Field(
        description="A list of at least one `{role, content}`."
    )
    max_tokens: Tokens = Field(description="Needed: an integer from 1 to 131072.")
    model: Model = Field(ABSENT, description="A string; where it is left out, the model of the settings.")
    system: System = Field(
        ABSENT, description="A string, or a list of `{type: text, text, cache_control?}`; no message has the role."
    )
    temperature: Temperature = Field(1.0, description="A number from 0 to 1.5.")
    top_p: TopP = Field(0.95, description="A number over 0, at most 1.")
    top_k: Annotated[int, Field(ge=0)] = Field(ABSENT, description="An integer, 0 or more.")
    stop_sequences: ListOf[str] = Field(ABSENT, description="A list of strings.")
    stream: bool | None = Field(
        False, description="True, false or null. True: streamed upstream, and the joined response is stored."
    )
    thinking: MessagesThinking = Field(
        ABSENT, description="An object: `{type: enabled, budget_tokens?}` or `{type: disabled}`."
    )
    tools: ListOf[MessagesTool] = Field(ABSENT, description="A list of `{name, input_schema, description?}`.")
    tool_choice: ToolChoice = Field(ABSENT, description="An object whose `type` is `auto`, `any`, `tool` or `none`.")
    metadata: dict[str, Any] = Field(ABSENT, description="An object.")
