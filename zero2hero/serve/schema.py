"""What a request may say, with a limit on every number, text and list.

pydantic checks a request before anything is done for it, strictly: "5" is no number, NaN is none either. A field that
nobody knows is passed over, as by other servers. A field that the API knows and this server does not serve is refused
by name, for an answer that silently lacks it would be wrong. No field holds a path, a template, a tensor or an address.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from zero2hero.serve.errors import UnsupportedField

MESSAGES, PARTS, PROMPTS, INPUTS, TOOLS, IMAGES = 256, 64, 64, 256, 64, 8
SCHEMA_BYTES, SCHEMA_DEPTH = 16 * 2**10, 16
TEXT = 2**21  # characters; how much a model reads is checked with its tokenizer
TOKEN = 2**24  # larger than every vocabulary

Name = Annotated[str, StringConstraints(max_length=256)]
Text = Annotated[str, StringConstraints(max_length=TEXT)]
TokenId = Annotated[int, Field(ge=0, lt=TOKEN)]
Count = Annotated[int, Field(ge=0, le=2**20)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=2**20)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Identifier = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Limited(BaseModel):
    """Everything that is said in a request."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")
    unsupported: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for field in cls.unsupported:
                if data.get(field) not in (None, [], {}):
                    raise UnsupportedField(field)
        return data


def _small_schema(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema that can be compiled in reasonable time; `deeper_than` has bounded its depth for `dumps`."""
    if len(json.dumps(value)) > SCHEMA_BYTES:
        raise ValueError(f"a JSON schema may have {SCHEMA_BYTES:,} bytes")
    level: list[Any] = [value]
    depth = 0
    while level:
        depth += 1
        if depth > SCHEMA_DEPTH:
            raise ValueError(f"a JSON schema may be nested {SCHEMA_DEPTH} deep")
        inner = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
        level = [child for child in inner if isinstance(child, (dict, list))]
    return value


JsonSchema = Annotated[dict[str, Any], AfterValidator(_small_schema)]


class StreamOptions(Limited):
    include_usage: bool | None = None


class Sampling(Limited):
    """How to write; None leaves it to generation_config.json, or else to the API's defaults."""

    model: Name
    n: int | None = Field(default=None, ge=1, le=8)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=TOKEN)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: (
        dict[Annotated[str, StringConstraints(pattern=r"^\d{1,8}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = Field(default=None, max_length=300)
    min_tokens: Count | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=16)
    ignore_eos: bool | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    unsupported: ClassVar[tuple[str, ...]] = ("suffix", "prompt_embeds")

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=PROMPTS)]
    )
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(default=None, ge=1, le=8)


class TextPart(Limited):
    type: Literal["text", "input_text", "output_text"]
    text: Text


class ImageAddress(Limited):
    url: Text
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Limited):
    """As POST /v1/chat/completions has it, or (an "input_image") POST /v1/responses."""

    type: Literal["image_url", "input_image"]
    image_url: ImageAddress | Text

    @property
    def address(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


Content = Text | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(max_length=PARTS)]


class CalledFunction(Limited):
    name: Identifier
    arguments: Text


class ToolCall(Limited):
    id: Name
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Limited):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=TOOLS)
    tool_call_id: Name | None = None


class Function(Limited):
    name: Identifier
    description: Text | None = None
    parameters: JsonSchema | None = None


class Tool(Limited):
    type: Literal["function"]
    function: Function


class FunctionName(Limited):
    name: Identifier


class NamedTool(Limited):
    type: Literal["function"]
    function: FunctionName


class SchemaFormat(Limited):
    name: Identifier
    schema_: JsonSchema = Field(alias="schema")


class ResponseFormat(Limited):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, which needs it")
        return self


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    unsupported: ClassVar[tuple[str, ...]] = (
        "audio", "prediction", "web_search_options", "functions", "function_call", "chat_template",
        "chat_template_kwargs", "documents", "prompt_embeds",
    )  # fmt: skip

    messages: list[ChatMessage] = Field(min_length=1, max_length=MESSAGES)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = Field(default=None, max_length=TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = Field(default=None, max_length=1)


class InputMessage(Limited):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class TextFormat(Limited):
    type: Literal["text", "json_object", "json_schema"]
    name: Identifier | None = None
    schema_: JsonSchema | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _has_its_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema belongs to the type json_schema, which needs it")
        return self


class TextOptions(Limited):
    format: TextFormat | None = None


class ResponsesRequest(Limited):
    """POST /v1/responses"""

    unsupported: ClassVar[tuple[str, ...]] = (
        "tools", "previous_response_id", "conversation", "prompt", "background", "include",
    )  # fmt: skip

    model: Name
    input: Text | Annotated[list[InputMessage], Field(min_length=1, max_length=MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    text: TextOptions | None = None
    stream: bool | None = None


class EmbeddingsRequest(Limited):
    """POST /v1/embeddings"""

    unsupported: ClassVar[tuple[str, ...]] = ("dimensions",)

    model: Name
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=INPUTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None


class TokenizeRequest(Limited):
    """POST /tokenize"""

    model: Name | None = None
    prompt: Text
    add_special_tokens: bool = True


class DetokenizeRequest(Limited):
    """POST /detokenize"""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2**20)]
