"""Bodies of requests: the fields that are read, and those that may not be ignored.

Any other field is ignored, as clients send fields of many servers. A field of `_REFUSED` would change the answer, so
a request that uses one is refused.
"""

from __future__ import annotations

from itertools import chain
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bindllm.model.generation.constraint import json_grammar
from bindllm.serving.api.errors import ApiError, shown

MOST_STOPS = 16
MOST_MESSAGES = 2048
"""Most messages, worked examples, and content parts of a worked example."""
MOST_KEYS = 16
MOST_BIASES = 1024
MOST_DEPTH = 64
MOST_TOOLS = 128

# Validation ends at the first item that is wrong: else a small body of wrong items would make a million errors.
Items = Field(max_length=MOST_MESSAGES, fail_fast=True)
Messages = Annotated[list[dict[str, Any]], Field(min_length=1), Items]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[str, Field(pattern=r"^\d{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
# OpenAI's own limit. Such a name needs no escape in a template or a grammar.
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
TopLogprobs = Annotated[int, Field(ge=0, le=20)]

# Where other servers and programs have media: here they are content parts, and a field would be dropped.
_MEDIA = dict.fromkeys(
    ("images", "image", "videos", "video", "audios", "audio", "files", "media", "documents"), ([],)
)
# Fields that would change an answer, and the values that stand for their absence. None always does. An endpoint that
# has the field reads it instead.
_REFUSED: dict[str, tuple[Any, ...]] = {
    **_MEDIA,
    "functions": ([],),
    **dict.fromkeys(("logit_bias", "structured_outputs"), ({},)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_p", "min_tokens", "top_k"), (0,)),
    **dict.fromkeys(("repetition_penalty", "length_penalty", "best_of"), (1,)),
    **dict.fromkeys(
        ("ignore_eos", "use_beam_search", "echo", "continue_final_message", "background"), (False,)
    ),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ()),
    **dict.fromkeys(("web_search_options", "previous_response_id", "conversation", "prompt"), ()),
    # Further ones of vLLM, llama.cpp and Hugging Face.
    **dict.fromkeys(("stop_token_ids", "bad_words", "allowed_token_ids", "logits_processors"), ([],)),
    **dict.fromkeys(
        ("prompt_logprobs", "truncate_prompt_tokens", "chat_template", "grammar", "json_schema"), ()
    ),
    **dict.fromkeys(("repeat_penalty", "typical_p"), (1,)),
    "include_stop_str_in_output": (False,),
    **dict.fromkeys(("chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs"), ({},)),
    # A limit on tokens has another name at every server.
    **dict.fromkeys(("max_new_tokens", "num_predict"), ()),
    "top_k": (0, -1),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "add_generation_prompt": (True,),
}
# A setting of the server, not a part of the description for the model.
_NOT_SHOWN = {"strict"}


class Settings(BaseModel):
    """An object of our own inside a body: a key that it does not have is a mistake."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _has_few_keys(cls, value: Any) -> Any:
        # Each unknown key is an error of its own.
        if isinstance(value, dict) and len(value) > MOST_KEYS:
            raise ValueError(f"more than {MOST_KEYS} keys")
        return value


class CacheSettings(Settings):
    """Settings of the visual cache for one request."""

    weight: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = None


class Body(BaseModel):
    """Fields that every request has."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    refused: ClassVar[dict[str, tuple[Any, ...]]] = _REFUSED

    model: str | None = Field(None, description="name of the model; may be left out")
    cache: bool | CacheSettings | None = Field(
        None,
        description="the visual cache: false for none, or its settings (default: that of the checkpoint)",
    )

    def refuse_unsupported(self) -> None:
        """Raise if a field would change the answer and is not supported.

        Raises:
            ApiError: names the field, with status 400.
        """
        for name, value in (self.model_extra or {}).items():
            if value is None or name not in self.refused:
                continue
            # By type too: in Python 0 equals False.
            neutral = self.refused[name]
            if not any(value == one and type(value) in (type(one), float) for one in neutral):
                hint = f"; only {' or '.join(map(shown_json, neutral))} can be given" if neutral else ""
                raise ApiError(
                    400,
                    f"{name} is {shown(value)}: this server does not support it, and without it the answer would be "
                    f"another one{hint}. Leave it out",
                    param=name,
                    code="unsupported_parameter",
                )


def shown_json(value: Any) -> str:
    """Return a neutral value of a field as JSON writes it."""
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def check_depth(value: Any, field: str) -> None:
    """Raise an ApiError if lists and objects are nested deeper than programs that read them can follow."""
    # Level by level: a function that calls itself would reach Python's own limit first.
    level = [value]
    for _ in range(MOST_DEPTH):
        inner = [
            one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)
        ]
        if not inner:
            return
        level = [*chain.from_iterable(inner)]
    raise ApiError(400, f"{field} is nested more than {MOST_DEPTH} deep", param=field.partition(".")[0])


def answer_grammar(given: dict[str, Any], schema: Any, field: str) -> str | None:
    """Return the grammar of a format that a request asks for; None: any text.

    Args:
        schema: the object with the keys ``name`` and ``schema``; the endpoints have it at different places.

    Raises:
        ApiError: another type, no schema, or one that is nested too deep.
    """
    match given.get("type"):
        case "text":
            return None
        # No schema, but more than "any text": clients parse the answer.
        case "json_object":
            return json_grammar({"type": "object"})
        case "json_schema" if isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
            check_depth(schema["schema"], field)
            return json_grammar(schema["schema"])
        case "json_schema":
            fault = "of type 'json_schema' and has no schema, which is an object"
        case other:
            fault = f"{shown(other)}, expected text, json_object or json_schema"
    raise ApiError(400, f"{field} is {fault}", param=field.partition(".")[0])


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool | None = None


class ShotBody(Settings):
    """A worked example: a question, which may have media, and its answer."""

    prompt: str | Annotated[list[dict[str, Any]], Items]
    answer: str


class FunctionBody(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(BaseModel):
    """A tool."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"]
    function: FunctionBody


class FunctionName(BaseModel):
    """Names a function."""

    name: str


class ToolChoice(BaseModel):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


class FunctionToolBody(BaseModel):
    """A tool as the Responses describe it: the function is not an object of its own."""

    model_config = ConfigDict(extra="allow", strict=True)

    # First, so that the error of another type of tool names the type and not a missing field.
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(BaseModel):
    """The function that must be called, as the Responses name it."""

    type: Literal["function"]
    name: str


class SampledBody(Body):
    """Fields that both forms of a question have."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    top_logprobs: TopLogprobs | None = None
    stream: bool | None = None
    shots: Annotated[list[ShotBody], Items] | None = Field(
        None, description="worked examples before the question"
    )
    neighbors: bool | None = Field(
        None, description="return the images that the visual cache blends in, with thumbnails"
    )
    parallel_tool_calls: bool | None = None


class ChatBody(SampledBody):
    """Body of ``/v1/chat/completions``."""

    # Those of the Responses.
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_REFUSED,
        **dict.fromkeys(("max_output_tokens", "instructions", "input", "text"), ()),
    }

    messages: Messages
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    n: Positive | None = None
    logprobs: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MOST_BIASES)] | None = None
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[ToolBody], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    stream_options: StreamOptions | None = None

    @property
    def functions(self) -> list[dict[str, Any]]:
        """The tools as chat templates read them."""
        return [
            tool.model_dump(exclude_unset=True, exclude={"function": _NOT_SHOWN}) for tool in self.tools or ()
        ]

    @property
    def loose(self) -> set[str]:
        """The functions whose arguments need not follow their schema."""
        return {tool.function.name for tool in self.tools or () if tool.function.strict is False}

    @property
    def named(self) -> str | None:
        """The function that must be called, if `tool_choice` names one."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None


class ResponsesBody(SampledBody):
    """Body of ``/v1/responses``."""

    # Those of the Chat Completions.
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_REFUSED,
        **dict.fromkeys(("max_tokens", "max_completion_tokens", "messages"), ()),
        "n": (1,),
        "logprobs": (False,),
    }

    input: str | Messages
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    include: Annotated[list[str], Items] | None = None
    text: dict[str, Any] | None = None
    tools: Annotated[list[FunctionToolBody], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None

    @property
    def functions(self) -> list[dict[str, Any]]:
        """The tools as chat templates read them."""
        dumps = (
            tool.model_dump(exclude_unset=True, exclude={"type", *_NOT_SHOWN}) for tool in self.tools or ()
        )
        return [{"type": "function", "function": function} for function in dumps]

    @property
    def loose(self) -> set[str]:
        """The functions whose arguments need not follow their schema."""
        return {tool.name for tool in self.tools or () if tool.strict is False}

    @property
    def named(self) -> str | None:
        """The function that must be called, if `tool_choice` names one."""
        return self.tool_choice.name if isinstance(self.tool_choice, FunctionChoice) else None


class EmbeddingsBody(Body):
    """Body of ``/v1/embeddings``."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_MEDIA,
        **dict.fromkeys(("messages", "prompt", "instruction", "truncate_prompt_tokens"), ()),
        "normalize": (True,),
    }

    input: str | list[Any] = Field(
        description="a text, or a list of texts and content parts; a list of parts is fused into one embedding"
    )
    # Checked by the endpoint, whose error lists the formats.
    encoding_format: str | None = None
    dimensions: Positive | None = None


class ErrorFields(BaseModel):
    """Fields of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every answer with an error."""

    error: ErrorFields
