"""What a request may say: OpenAI's fields and vLLM's extra ones, strictly typed.

Fields that change nothing here are accepted and ignored. Fields that would change the answer in a way that this server
cannot are accepted only at the value that changes nothing. Everything else is refused by name.
"""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .engine import SamplingParams

MAX_SEQUENCES = 128
Model = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class StreamOptions(BaseModel):
    """`include_usage`: a last chunk without choices carries the usage."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


class JsonSchema(BaseModel):
    """A JSON Schema with a name, which changes nothing; answers are always held to it strictly."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, StringConstraints(max_length=64)] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """`text`, any JSON object, or a document of a JSON Schema."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("json_schema", "json_schema goes with the type json_schema, and only with it")
        return self

    @property
    def schema_text(self) -> str | None:
        """The schema that answers are held to, as text."""
        if self.type == "text":
            return None
        schema = self.json_schema and self.json_schema.schema_
        return msgspec.json.encode({"type": "object"} if schema is None else schema).decode()


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: Model
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    user: Annotated[str, StringConstraints(max_length=256)] | None = None
    safety_identifier: Annotated[str, StringConstraints(max_length=256)] | None = None
    # Accepted and ignored
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _only_what_can_be_done(self) -> "_Request":
        for name, values in self.neutral.items():
            value = getattr(self, name)
            if value is not None and value not in values:
                raise PydanticCustomError("unsupported_parameter", f"{name} is not supported by this server")
        return self

    @field_validator("logit_bias")
    @classmethod
    def _tokens_as_numbers(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if bias and not all(token.isascii() and token.isdigit() and len(token) < 10 for token in bias):
            raise PydanticCustomError("invalid_logit_bias", "the keys of logit_bias are token ids")
        return bias

    @property
    def choices(self) -> int:
        """Answers wanted for each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """The engine's parameters."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given = {
            name: getattr(self, name)
            for name in (
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "seed",
                "presence_penalty",
                "frequency_penalty",
                "repetition_penalty",
                "ignore_eos",
            )
        }
        return SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs,
            json_schema=None if self.response_format is None else self.response_format.schema_text,
            stop=tuple(text for text in stop if text),
            logit_bias={int(token): float(value) for token, value in (self.logit_bias or {}).items()},
            **{name: value for name, value in given.items() if value is not None},
        )


class CompletionRequest(_Request):
    """POST /v1/completions. `prompt`: text, a list of texts, token ids, or a list of lists of token ids."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"echo": (False,), "suffix": ("",)}

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_SEQUENCES)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_SEQUENCES)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _of_a_size(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.choices:
            raise PydanticCustomError("unsupported_parameter", "best_of other than n is not supported by this server")
        if len(self.prompts) * self.choices > MAX_SEQUENCES:
            raise PydanticCustomError("too_many", f"at most {MAX_SEQUENCES} answers can be asked for at once")
        return self

    @property
    def prompts(self) -> "list[str] | list[list[int]]":
        """The prompts, one or more."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn. What OpenAI's answers carry beside the text may be sent back as long as it is empty."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def turn(self) -> dict[str, str]:
        """Role and text, as the chat template takes them."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    # Accepted and ignored
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @model_validator(mode="after")
    def _logprobs_agree(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("logprobs", "top_logprobs needs logprobs to be true")
        return self
