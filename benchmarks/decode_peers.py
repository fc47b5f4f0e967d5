"""The contenders of `decode_cpu.py`.

This file is the worker. The interpreter that has the peers runs it, which need not have `internlm`: ours and each peer
are imported only where they are used. A contender is a function that loads the folder and returns
`answer(prompts, new) -> tokens`; prompts have one length. The first job names it, those after it hold prompts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import workers
from llama import generate

Answer = Callable[[list[list[int]], int], list[list[int]]]


def internlm(kind: str | None, folder: Path, length: int) -> Answer:
    """Our engine; `kind`: how its linear layers are packed."""
    from internlm.infer.engine import Engine, Limits
    from internlm.infer.placement import Placement
    from internlm.source import open_source

    # Prompts come again: one that is found in the cache would look like a fast one.
    limits = Limits(batch=64, length=length, cache_tokens=17 * length, share=False)
    engine = Engine.of(open_source(folder), Placement(pack=kind), limits)

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        return [result.tokens for result in engine.generate(prompts, max_tokens=new, temperature=0)]

    return answer


def transformers(cache: str, folder: Path, length: int) -> Answer:
    """`generate` with a growing ("dynamic") or a fixed ("static") cache."""
    model = _transformers(folder)
    options = {"cache_implementation": "static"} if cache == "static" else {}
    return lambda prompts, new: generate(model, prompts, new, **options)


def transformers_batching(folder: Path, length: int) -> Answer:
    """`generate_batch`, its continuous batching, with a cache that is sized by hand: by itself it does not end."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _transformers(folder)
    page = 32
    sizes = ContinuousBatchingConfig(num_blocks=17 * (length // page + 1), page_size=page, max_batch_tokens=2048)

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1)
        out = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=sizes)
        return [list(one.generated_tokens) for one in out.values()]

    return answer


def litgpt(folder: Path, length: int) -> Answer:
    """Litgpt's own model and cache in its `generate`'s loop; it knows batches of one length."""
    from litgpt import GPT, Config
    from safetensors.torch import load_file

    shape = json.loads((folder / "config.json").read_text())
    config = Config(
        name="benchmark", block_size=length, vocab_size=shape["vocab_size"], padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"], n_head=shape["num_attention_heads"], n_embd=shape["hidden_size"],
        rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
        norm_eps=shape["rms_norm_eps"], mlp_class_name="LLaMAMLP", intermediate_size=shape["intermediate_size"],
    )  # fmt: skip
    model = GPT(config).eval()
    named: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        named |= load_file(file)
    places = {
        "lm_head.weight": "lm_head.weight", "transformer.wte.weight": "model.embed_tokens.weight",
        "transformer.ln_f.weight": "model.norm.weight",
    }  # fmt: skip
    parts = {
        "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
    }  # fmt: skip
    state = {own: named[theirs] for own, theirs in places.items()}
    for i in range(config.n_layer):
        own, theirs = f"transformer.h.{i}.", f"model.layers.{i}."
        state |= {f"{own}{a}.weight": named[f"{theirs}{b}.weight"] for a, b in parts.items()}
        qkv = [named[f"{theirs}self_attn.{x}_proj.weight"] for x in "qkv"]
        state[f"{own}attn.qkv.weight"] = torch.cat(qkv)
    model.load_state_dict(state)

    @torch.inference_mode()
    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        model.set_kv_cache(batch_size=len(prompts), max_seq_length=length)
        ids = torch.tensor(prompts)
        start = ids.shape[1]
        logits = model(ids, torch.arange(start))[:, -1]
        out = [logits.argmax(-1)]
        for place in range(start, start + new - 1):
            out.append(model(out[-1][:, None], torch.tensor([place]))[:, -1].argmax(-1))
        return torch.stack(out, 1).tolist()

    return answer


def llama_cpp(kind: str, folder: Path, length: int) -> Answer:
    """llama.cpp on a GGUF folder beside this one, through its C interface: all prompts at once, as its server does."""
    import llama_cpp as library
    import numpy as np

    library.llama_backend_init()
    quiet = library.llama_log_callback(lambda level, text, data: None)
    library.llama_log_set(quiet, None)
    file = str(next((folder.parent / f"gguf-{kind}").glob("*.gguf")))
    model = library.llama_model_load_from_file(file.encode(), library.llama_model_default_params())
    words = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    settings = library.llama_context_default_params()
    texts, step = 16, 512
    settings.n_ctx, settings.n_seq_max, settings.n_batch, settings.n_ubatch = texts * length, texts, step, step
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    context = library.llama_init_from_model(model, settings)
    batch = library.llama_batch_init(step, 0, 1)

    def decode(entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, place, text, whether its logits are wanted); return the best next token of each wanted."""
        best = []
        for first in range(0, len(entries), step):
            part = entries[first : first + step]
            batch.n_tokens = len(part)
            for i, (token, place, text, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, place, 1
                batch.seq_id[i][0], batch.logits[i] = text, wanted
            if library.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            for i, entry in enumerate(part):
                if entry[3]:
                    logits = np.ctypeslib.as_array(library.llama_get_logits_ith(context, i), (words,))
                    best.append(int(logits.argmax()))
        return best

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        library.llama_memory_clear(library.llama_get_memory(context), True)
        start = len(prompts[0])
        prompt = [(t, p, i, p == start - 1) for i, x in enumerate(prompts) for p, t in enumerate(x)]
        out = [decode(prompt)]
        for place in range(start, start + new - 1):
            out.append(decode([(token, place, i, True) for i, token in enumerate(out[-1])]))
        return [list(answer) for answer in zip(*out, strict=True)]

    answer.kept = quiet  # type: ignore[attr-defined]  # the library calls it as long as it lives
    return answer


def _transformers(folder: Path) -> Any:
    import transformers as library

    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library.AutoModelForCausalLM.from_pretrained(folder).eval()


CONTENDERS: dict[str, Callable[[Path, int], Answer]] = {
    "internlm": partial(internlm, "fp32"),
    "internlm split": partial(internlm, "split"),
    "internlm fp16": partial(internlm, "fp16"),
    "internlm bf16": partial(internlm, "bf16"),
    "internlm int8": partial(internlm, "int8"),
    "transformers": partial(transformers, "dynamic"),
    "transformers static": partial(transformers, "static"),
    "transformers batching": transformers_batching,
    "litgpt": litgpt,
    "llama.cpp": partial(llama_cpp, "f32"),
    "llama.cpp f16": partial(llama_cpp, "f16"),
    "llama.cpp q8_0": partial(llama_cpp, "q8_0"),
}


class Contender:
    """Answers jobs: loads what the first one names, then times itself on prompts."""

    def __init__(self) -> None:
        self.answer: Answer | None = None

    def do(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return seconds and tokens for a job with prompts; nothing for the first one."""
        if self.answer is None:
            torch.set_num_threads(job["threads"])
            self.answer = CONTENDERS[job["name"]](Path(job["folder"]), job["length"])
            return {}
        begin = time.perf_counter()
        tokens = self.answer(job["prompts"], job["new"])
        return {"seconds": time.perf_counter() - begin, "tokens": tokens}


if __name__ == "__main__":
    workers.answer(Contender().do)
