"""What would go wrong with an export on another engine, each with what to do about it.

    [finding for check in CHECKS for finding in check(export, wish)]

A new check is a function and its name in CHECKS. What an engine can and cannot do is data, in peers.py.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator

from internlm.errors import WeightsError
from internlm.infer.client import LOOPBACK
from internlm.model.config import DynamicScaling, ModelConfig
from internlm.serve.handover import peers
from internlm.serve.handover.found import Export, Finding, Wish
from internlm.text.chat import stop_ids
from internlm.weights.gguf import fields
from internlm.weights.talk import TEMPLATE_KEY, is_written_by


def _check_tokenizer(export: Export, wish: Wish) -> Iterator[Finding]:
    if export.is_gguf or "tokenizer.json" in export.tokenizer_files:
        return
    if not export.tokenizer_files:
        yield Finding("there is no tokenizer", "`internlm convert` takes one with --tokenizer PATH.", blocks=True)
    else:
        yield Finding("there is no tokenizer.json, which engines load without further packages", _reconvert(export))


def _check_template(export: Export, wish: Wish) -> Iterator[Finding]:
    if export.template:
        return
    tokenizer = export.talk.tokenizer
    bos = "" if tokenizer is None or tokenizer.bos_id is None else ", each prompt with bos in front"
    yield Finding(
        f"there is no chat format: this is a base model; /v1/chat/completions {wish.peer.bare_chat}",
        f"Use /v1/completions{bos}. If it is a chat model: `internlm convert … --template NAME`.",
    )


def _check_recorded(export: Export, wish: Wish) -> Iterator[Finding]:
    name = export.talk.template
    if name is None or not export.template or is_written_by(name, export.template):
        return
    what = f"{export.template_file} does not hold the chat format {name}, which is recorded"
    do = f"`internlm convert {shlex.quote(export.path)} NEW` writes the recorded one; if the other is right, take "
    do += f'"{TEMPLATE_KEY}" out of tokenizer_config.json.'
    yield Finding(what, do, blocks=True)


def _check_stops(export: Export, wish: Wish) -> Iterator[Finding]:
    talk = export.talk
    if talk.tokenizer is None or talk.format is None:
        return
    ends = stop_ids(talk.format, talk.tokenizer)
    missing = [id_ for id_ in ends if id_ not in export.eos and id_ != talk.tokenizer.eos_id]
    if missing:
        names = ", ".join(f"{talk.tokenizer.decode([id_])} ({id_})" for id_ in missing)
        do = "Let every request name it in `stop`." if export.is_gguf else _reconvert(export)
        yield Finding(f"answers would not end at {names}, which {export.eos_file} does not name", do)


def _check_bos(export: Export, wish: Wish) -> Iterator[Finding]:
    # vLLM and SGLang add no special tokens to a rendered prompt; llama.cpp takes a second one off.
    if wish.engine != "lmdeploy" or not export.adds_bos or export.template is None or export.talk.tokenizer is None:
        return
    tokenizer = export.talk.tokenizer
    assert tokenizer.bos_id is not None, "it would add none"
    if "bos_token" in export.template or tokenizer.decode([tokenizer.bos_id]) in export.template:
        do = _reconvert(export) if export.talk.template else "Take bos out of the chat format."
        yield Finding("every chat would begin with bos twice: tokenizer.json and the chat format both write it", do)


def _check_name(export: Export, wish: Wish) -> Iterator[Finding]:
    for pattern, chosen in wish.peer.template_names.items():
        if re.search(pattern, export.path.lower()):
            if wish.engine == "lmdeploy" and export.template:
                what = f"the path would select the chat format {chosen!r}; --chat-template hf of the command undoes it"
                yield Finding(what, "Keep that option, or rename the folder.")
            else:
                do = "Rename the folder, or give its path by a link of another name."
                yield Finding(f"the path selects the chat format {chosen!r} of {wish.engine}", do, blocks=True)
            return


def _check_heads(export: Export, wish: Wish) -> Iterator[Finding]:
    size = export.config.head_dim
    if wish.engine != "lmdeploy" or size == peers.TURBOMIND_KV_HEAD:
        return
    if size not in peers.TURBOMIND_HEADS:
        sizes = ", ".join(map(str, peers.TURBOMIND_HEADS))
        what = f"TurboMind has no attention for heads of {size} (only {sizes}): the command takes the PyTorch engine"
        yield Finding(what, "Nothing has to be done; it is slower.")
    else:
        what = f"TurboMind keeps keys and values in 4 or 8 bits for heads of 128 only, and these have {size}"
        yield Finding(what, "Leave --quant-policy out.")


def _check_rope(export: Export, wish: Wish) -> Iterator[Finding]:
    scaling, context, limit = export.config.rope.scaling, export.config.context_length, export.limit(wish.engine)
    if wish.engine == "sglang" and isinstance(scaling, DynamicScaling) and scaling.factor != 1.0:
        what = f"SGLang takes one rotary base for all texts (factor {scaling.factor:g}), so short ones change too"
        yield Finding(what, "Serve it with LMDeploy or `internlm serve`.", blocks=True)
    elif limit < context:
        title = "LMDeploy's PyTorch engine" if wish.engine == "lmdeploy" else wish.peer.title
        what = f"{title} does not extend by dynamic NTK as trained: the context is the first {limit} tokens"
        other = "LMDeploy (--engine lmdeploy) or " if export.is_for_turbomind or export.is_gguf else ""
        yield Finding(what, f"For {context} tokens take {other}`internlm serve`.")


def _check_dtype(export: Export, wish: Wish) -> Iterator[Finding]:
    if export.is_gguf or export.dtype == "bfloat16":
        return
    what = f"the weights are stored as {export.dtype} and run as bfloat16"
    if wish.engine == "lmdeploy":
        what += " (without --dtype LMDeploy would take float16, in which large activations overflow)"
    yield Finding(what, "`internlm convert … --dtype bfloat16` stores what is run.")


def _check_class(export: Export, wish: Wish) -> Iterator[Finding]:
    title, name = wish.peer.title, export.architecture
    if export.config.output_bias and name in wish.peer.unbiased:
        what = f"{title} has no bias on the attention's output in {name}"
        yield Finding(what, "Serve it with LMDeploy, SGLang or `internlm serve`.", blocks=True)
    if export.config.tie_embeddings and name in wish.peer.untied:
        what = f"{title} does not tie the head of a {name} to its embedding"
        yield Finding(what, "Serve it with vLLM or `internlm serve`.", blocks=True)


def _check_shape_of_file(export: Export, wish: Wish) -> Iterator[Finding]:
    if wish.engine != "llama.cpp":
        return
    try:
        fields.architecture(export.config)
    except WeightsError as error:
        yield Finding(str(error), "Serve it with another engine.", blocks=True)


def _check_tensor(export: Export, wish: Wish) -> Iterator[Finding]:
    config, parts = export.config, wish.tensor
    if wish.engine == "llama.cpp":  # it shares out layers
        if parts > config.num_layers:
            yield Finding(f"{config.num_layers} layers are shared out to {parts} GPUs", "Lower --tensor.", blocks=True)
        return
    wants_power = wish.engine == "lmdeploy"
    divisors = [n for n in range(1, config.num_heads + 1) if _divides(config, n)]
    fits = [n for n in divisors if not (wants_power and n & (n - 1))]
    if parts not in fits:
        what = f"{parts} GPUs cannot share {config.num_heads} heads, {config.num_kv_heads} key-value heads and "
        what += f"{config.ffn_size} feed-forward columns" + (", or are no power of 2" if wants_power else "")
        yield Finding(what, f"Give --tensor {', '.join(map(str, fits))}.", blocks=True)
    elif config.num_kv_heads % parts:
        what = f"{config.num_kv_heads} key-value heads on {parts} GPUs: some hold copies of the same"
        yield Finding(what, "Nothing has to be done; the cache holds less than it could.")


def _divides(config: ModelConfig, parts: int) -> bool:
    kv = config.num_kv_heads
    return not (config.num_heads % parts or config.ffn_size % parts) and (kv % parts == 0 or parts % kv == 0)


def _check_door(export: Export, wish: Wish) -> Iterator[Finding]:
    if wish.api_key is None and wish.host not in LOOPBACK:
        yield Finding(f"whoever reaches {wish.host}:{wish.port} can use the model", "Give --api-key.")
    if wish.api_key is not None and wish.peer.key_variable is None:
        what = f"{wish.peer.title} takes the key from its command line, where every user of the machine can read it"
        yield Finding(what, "Put a proxy that asks for the key in front, or take care who logs in.")


CHECKS: tuple[Callable[[Export, Wish], Iterable[Finding]], ...] = (
    _check_tokenizer, _check_template, _check_recorded, _check_stops, _check_bos, _check_name, _check_heads,
    _check_rope, _check_dtype, _check_class, _check_shape_of_file, _check_tensor, _check_door,
)  # fmt: skip
"""In the order in which findings are told."""


def _reconvert(export: Export) -> str:
    return f"`internlm convert {shlex.quote(export.path)} NEW` writes it."
