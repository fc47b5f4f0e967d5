"""The types of the fields in `schema`: what JSON may stand there, and what is said of anything else.

At the end are the fields that clients send, which would change an answer and which this server does not have. Any other
that is not in `schema` is let pass: clients are newer than servers.

A field of several kinds is told apart at the first look, so that a client reads of the kind that it meant, not of all.
Lists end at their first fault: a body of a megabyte can hold 300,000, and each costs microseconds of the event loop.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Discriminator, Field, Tag

_Item = TypeVar("_Item")


def _whole(value: Any) -> Any:
    """Return 1 for 1.0, which JSON Schema calls an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _wholes(values: Any) -> Any:
    """Return a list with its whole numbers as such. One look at the whole is a tenth of a call for each."""
    if isinstance(values, list) and float in set(map(type, values)):
        return [_whole(value) for value in values]
    return values


def by_type(words: str, **kinds: type) -> Discriminator:
    """Return what tells the kinds of a field apart by their type; `words` say what it takes."""
    tags = {type_: f"[{tag}]" for tag, type_ in kinds.items()}
    return Discriminator(lambda value: tags.get(type(value)), custom_error_type="kind", custom_error_message=words)


def _prompt_kind(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return "[text]"
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    return {str: "[texts]", int: "[ids]", float: "[ids]", list: "[lists]"}.get(type(first))


def _check_bias(biases: Any) -> Any:
    """Check the ids and values of a logit_bias, up to the first that is wrong."""
    if biases is None:
        return None
    if not isinstance(biases, dict):
        raise ValueError('must be an object of ids of tokens and biases, such as {"15": -100}')
    for id_, bias in biases.items():
        if not (isinstance(id_, str) and id_.isascii() and id_.isdigit() and len(id_) < 10):
            raise ValueError(f"{str(id_)[:40]!r} is no id of a token: /tokenize tells the ids of a text")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of {id_} must be a number from -100 to 100")
    return biases


def text_only(content: Any) -> Any:
    """Return a content, refusals in it as text, after a word to clients that send pictures or sound."""
    if not isinstance(content, list):
        return content
    found = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "refusal":
            part = {"type": "text", "text": part.get("refusal")}
        elif isinstance(kind, str) and kind != "text":
            raise ValueError(f"this model reads text only, and here is a part of type {kind[:40]!r}")
        found.append(part)
    return found


Many = Annotated[list[_Item], Field(fail_fast=True)]
"""A list that is looked through up to its first fault."""
Whole = Annotated[int, Field(strict=True), BeforeValidator(_whole)]
Bool = Annotated[bool, Field(strict=True)]
Count = Annotated[Whole, Field(ge=0, lt=2**31)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Probability = Annotated[Number, Field(ge=0, le=1)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Name = Annotated[str, Field(max_length=512)]
Text = Annotated[str, Tag("[text]")]
Ids = Annotated[Many[Annotated[int, Field(strict=True, ge=0, lt=2**31)]], BeforeValidator(_wholes)]
Bias = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[Number, Field(ge=-100, le=100)]],
    BeforeValidator(_check_bias),
]
"""Id, as JSON's keys are texts → what is added to its logit."""

StopText = Annotated[str, Field(min_length=1, max_length=1024)]
Stop = Annotated[
    Annotated[StopText, Tag("[text]")] | Annotated[Many[StopText], Field(max_length=16), Tag("[texts]")],
    by_type("must be a text or a list of texts", text=str, texts=list),
]
StopIds = Annotated[Ids, Field(max_length=64)]
LongText = Annotated[str, Field(min_length=1, max_length=2**16)]
Expression = Annotated[str, Field(min_length=1, max_length=8192)]
Choices = Annotated[Many[str], Field(min_length=1, max_length=4096)]
Schema = Annotated[
    Text | Annotated[dict[str, Any], Tag("[object]")],
    by_type("must be a JSON Schema: an object, or the text of one", text=str, object=dict),
]
Texts = Annotated[
    Text | Annotated[Many[str], Field(max_length=2048), Tag("[texts]")],
    by_type("must be a text or a list of texts", text=str, texts=list),
]
Prompt = Annotated[
    Text
    | Annotated[Many[str], Field(min_length=1, max_length=2048), Tag("[texts]")]
    | Annotated[Ids, Field(min_length=1), Tag("[ids]")]
    | Annotated[Many[Annotated[Ids, Field(min_length=1)]], Field(min_length=1, max_length=2048), Tag("[lists]")],
    Discriminator(
        _prompt_kind,
        custom_error_type="kind",
        custom_error_message="must be a text, texts, ids of tokens (whole numbers), or lists of ids, and not empty",
    ),
]
"""A text, texts, ids, or lists of ids."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "audio": (None,),
    "modalities": (None, ["text"]),
    "web_search_options": (None,),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "suffix": (None, ""),
    "reasoning": (None,),
    # vLLM's
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "echo": (None, False),
    "add_special_tokens": (None, False),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}, {"enable_thinking": False}, {"thinking": False}),
    "documents": (None, []),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1),
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None,),
    "bad_words": (None, []),
    "allowed_token_ids": (None, []),
    "logprob_token_ids": (None, []),
    "guided_whitespace_pattern": (None,),
    "whitespace_pattern": (None,),
    "disable_any_whitespace": (None, False),
    "disable_additional_properties": (None, False),
    "structural_tag": (None,),
    "logits_processors": (None, []),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "cache_salt": (None, ""),
    # SGLang's, LMDeploy's, llama.cpp's, Transformers' and others'
    "regex": (None,),
    "ebnf": (None,),
    "json_schema": (None,),
    "stop_regex": (None, []),
    "no_stop_trim": (None, False),
    "lora_path": (None,),
    "adapter_name": (None,),
    "do_preprocess": (None, True),
    "enable_thinking": (None, False),
    "min_new_tokens": (None, 0),
    "grammar": (None, ""),
    "typical_p": (None, 1),
    "mirostat": (None, 0),
    "max_new_tokens": (None,),
    "max_length": (None,),
    "do_sample": (None, True),
    "num_beams": (None, 1),
    "repeat_penalty": (None, 1),  # over the last tokens only: repetition_penalty counts all
    "n_predict": (None, -1),
    "stop_sequences": (None, []),
    "random_seed": (None,),
    "xtc_probability": (None, 0),
    "dry_multiplier": (None, 0),
    "dynatemp_range": (None, 0),
    "top_n_sigma": (None, -1, 0),
    "top_a": (None, 0),
    "tfs_z": (None, 1),
}
"""Name → the values that change nothing here, so that whoever sends its defaults is served.

The models have no thinking that could be switched off, so switching it off is harmless.
"""

INSTEAD = {
    "repeat_penalty": "repetition_penalty",
    "n_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_sequences": "stop",
    "random_seed": "seed",
    "regex": "guided_regex",
    "ebnf": "guided_grammar",
    "grammar": "guided_grammar",
    "json_schema": "guided_json",
    "functions": "tools",
    "function_call": "tool_choice",
}
"""Name → the field here that does the same, or nearly."""
