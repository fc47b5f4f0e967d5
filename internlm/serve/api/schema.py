"""The bodies of the OpenAI-compatible API, as types: what is not written here is accepted and has no effect.

Numbers are taken as numbers only (no "1", no true for 1), and none is NaN or infinite. What would change an answer and
cannot be done is refused (`Body.unsupported`), never passed over.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Tag, model_validator

from internlm.serve.api.fields import (
    UNSUPPORTED,
    Bias,
    Bool,
    Choices,
    Count,
    Expression,
    Ids,
    LongText,
    Many,
    Name,
    Number,
    Penalty,
    Probability,
    Prompt,
    Schema,
    Stop,
    StopIds,
    Text,
    Texts,
    Whole,
    by_type,
    text_only,
)

Finish = Literal["stop", "length", "tool_calls", "abort", "timeout"]
"""Why an answer ended. The last two are not OpenAI's: the server stopped, or the time was over."""


class Body(BaseModel):
    """What a request holds. Unknown fields are kept aside, not refused: clients are newer than servers."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": True})

    @property
    def unsupported(self) -> str | None:
        """The first field that would have an effect and has none here; None: there is none."""
        given = self.model_extra or {}
        wrong = (name for name, harmless in UNSUPPORTED.items() if name in given and given[name] not in harmless)
        return next(wrong, None)


class StreamOptions(Body):
    """What a stream has beside the answer."""

    include_usage: Bool | None = None
    continuous_usage_stats: Bool | None = None
    """Whether every chunk has the usage so far, and not just the last."""


class Sampling(Body):
    """What chat and completion requests share."""

    model: Name | None = None
    n: Annotated[Whole, Field(ge=1, le=128)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=2**31)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Bias | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    stop_token_ids: StopIds | None = None
    include_stop_str_in_output: Bool | None = None
    min_tokens: Count | None = None
    ignore_eos: Bool | None = None
    skip_special_tokens: Bool | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=1, lt=2**31)] | None = None
    stream: Bool | None = None
    stream_options: StreamOptions | None = None
    timeout: Annotated[Number, Field(gt=0)] | None = None
    """Seconds after which the answer ends where it is; the server may allow less."""
    best_of: Annotated[Whole, Field(ge=1, le=128)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: Structure | None = None
    guided_json: Schema | None = None
    guided_regex: Expression | None = None
    guided_choice: Choices | None = None
    guided_grammar: LongText | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams: set stream to true")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported, unless it equals n")
        return self


class Structure(Body):
    """What the answer must look like, in vLLM's words. The `guided_` fields are its older ones."""

    json_: Annotated[Schema | None, Field(alias="json")] = None
    """A JSON Schema."""
    json_object: Bool | None = None
    regex: Expression | None = None
    choice: Choices | None = None
    grammar: LongText | None = None


class SchemaFormat(Body):
    """A JSON Schema with a name."""

    name: Name | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: Bool | None = None


class ResponseFormat(Body):
    """What the answer must look like. `regex` is not OpenAI's, `regex_schema` is LMDeploy's name for it."""

    type: Literal["text", "json_object", "json_schema", "regex", "regex_schema"]
    json_schema: SchemaFormat | None = None
    regex: Expression | None = None
    regex_schema: Expression | None = None

    @model_validator(mode="after")
    def _check_together(self) -> ResponseFormat:
        if self.type not in ("text", "json_object") and getattr(self, self.type) is None:
            raise ValueError(f"{self.type} is missing")
        return self


class TextPart(Body):
    """A part of a message. Only text can be read here."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[
        Text | Annotated[Many[TextPart], Field(max_length=1024), Tag("[parts]")],
        by_type("must be a text or a list of parts", text=str, parts=list),
    ],
    BeforeValidator(text_only),
]


class FunctionCall(Body):
    """Which function is called, with its arguments as JSON text."""

    name: Name
    arguments: str


class ToolCall(Body):
    """A call that the assistant made."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """What one party says."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: Annotated[Many[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Name | None = None
    refusal: str | None = None
    """What an assistant said in place of a content."""

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or self.refusal or ""


class Function(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """A tool; only functions are known."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a function."""

    name: Name


class NamedTool(Body):
    """A tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("[word]")] | Annotated[NamedTool, Tag("[tool]")],
    by_type('must be "none", "auto", "required" or {"type": "function", …}', word=str, tool=dict),
]


Messages = Annotated[Many[ChatMessage], Field(min_length=1, max_length=4096)]
Tools = Annotated[Many[Tool], Field(max_length=128)]


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Messages
    logprobs: Bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Bool | None = None
    add_generation_prompt: Bool | None = None
    continue_final_message: Bool | None = None
    """Whether the answer goes on with the last message, which is the assistant's."""

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        return self


class LegacyChatRequest(ChatRequest):
    """POST /internlm/chat/completions, as InternLM's first server had it."""

    max_length: Annotated[Whole, Field(ge=1, lt=2**31)] | None = None
    """Tokens of prompt and answer together."""


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Prompt
    echo: Bool | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    add_special_tokens: Bool | None = None
    """Whether a prompt that is a text begins with bos (default: yes)."""


class TokenizeRequest(Body):
    """POST /tokenize: a text, or a conversation."""

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: Bool = True
    return_token_strs: Bool = False
    tools: Tools | None = None
    add_generation_prompt: Bool | None = None
    continue_final_message: Bool | None = None

    @model_validator(mode="after")
    def _check_together(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class TokenizeAnswer(BaseModel):
    """The ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Name | None = None
    tokens: Ids


class DetokenizeAnswer(BaseModel):
    """The text of ids."""

    prompt: str


class EncodeRequest(Body):
    """POST /v1/encode, as LMDeploy has it."""

    input: Texts
    do_preprocess: Bool = False
    """Whether the text is a user message, to be written in the chat format."""
    add_bos: Bool = True


class EncodeAnswer(BaseModel):
    """The ids of a text, or of several."""

    input_ids: list[int] | list[list[int]]
    length: int | list[int]


class Problem(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every response that is not a success."""

    error: Problem


class ModelCard(BaseModel):
    """A model that can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "internlm"
    root: str | None = None
    parent: str | None = None
    max_model_len: int


class ModelList(BaseModel):
    """The models that can be asked for."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class CachedTokens(BaseModel):
    """Tokens of the prompt that did not have to be computed."""

    cached_tokens: int


class Usage(BaseModel):
    """What was computed."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TopLogprob(BaseModel):
    """How probable a token was."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """How probable the token was, and the most probable in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """How probable the tokens of an answer were."""

    content: list[TokenLogprob]


class ToolCallAnswer(BaseModel):
    """A function that the model wants to be called."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    """What it said to itself before a call."""
    tool_calls: list[ToolCallAnswer] | None = None


class ChatChoice(BaseModel):
    """An answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish


class ChatAnswer(BaseModel):
    """The answers to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """How probable the tokens of a text were; the first of a prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None


class CompletionAnswer(BaseModel):
    """The continuations of the prompts."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
