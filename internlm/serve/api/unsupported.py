"""Fields that clients send, which would change an answer and which this server does not have.

Any other field that is not in `schema` is let pass: clients are newer than servers.
"""

from __future__ import annotations

from typing import Any

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
