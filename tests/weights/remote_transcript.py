"""What folders with remote code do under some version of Transformers: a script that knows nothing of this package.

    python remote_transcript.py REQUEST.pt ANSWER.pt

The request maps the name of a case to its folder and what to ask; the answer maps it to what was seen.
"""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import tempfile
import threading
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

Seen = dict[str, Any]


class Counter:
    """Counts steps of generation; fails at one of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.steps, self.fails_at = 0, fails_at

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        if self.steps == self.fails_at:
            raise RuntimeError("planted")
        return scores


def streams_running() -> int:
    return sum(thread.name == "stream_chat" for thread in threading.enumerate())


def see_tokenizer(tokenizer: Any, texts: list[str]) -> Seen:
    coded = [tokenizer(text)["input_ids"] for text in texts]
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    again = pickle.loads(pickle.dumps(copy.deepcopy(tokenizer)))
    seen = {
        "ids": coded,
        "plain_ids": plain,
        "decoded": [tokenizer.decode(ids) for ids in plain],
        "pickled_ids": [again(text)["input_ids"] for text in texts],
        "roles": (tokenizer.bos_token_id, tokenizer.eos_token_id),
    }
    if hasattr(tokenizer, "text_ids"):
        seen["text_ids"] = [tokenizer.text_ids(text) for text in texts]
        seen["after_bos"] = [tokenizer(tokenizer.bos_token + text)["input_ids"] for text in texts]
        ends = tokenizer.convert_tokens_to_ids(["a", "<eoa>", "b", "</s>"])
        seen["silent"] = tokenizer.decode(ends, skip_special_tokens=True)
        seen["pad"] = tokenizer.pad_token_id
        batch = tokenizer(texts[:2], padding=True, return_tensors="pt")
        seen["batch"] = (batch["input_ids"], batch["attention_mask"])
    return seen


@torch.no_grad()
def see_model(model: Any, ids: torch.Tensor) -> Seen:
    seen: Seen = {"logits": model(ids).logits, "short": model(ids[:, :20]).logits}
    steps, past = [], None
    for at in range(ids.shape[1]):
        out = model(ids[:, at : at + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append((out.logits[:, 0] - model(ids[:, : at + 1], use_cache=False).logits[:, -1]).abs().max().item())
    seen["cached"] = max(steps)
    short = ids[:1, :20]
    padded = torch.cat((torch.zeros(1, 15, dtype=torch.long), short), dim=1)
    rows = torch.cat((padded, ids[1:2, :35]))
    mask = torch.ones_like(rows)
    mask[0, :15] = 0
    alone = model(short).logits
    seen["padded"] = (model(rows, attention_mask=mask).logits[:1, 15:] - alone).abs().max().item()
    seen["attentions"] = (model(rows, attention_mask=mask, output_attentions=True).logits[:1, 15:] - alone).abs().max()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    single = model.generate(short, **options)[0, 20:]
    seen["batched"] = torch.equal(model.generate(rows, attention_mask=mask, **options)[0, 35:], single)
    beams = [model.generate(short, num_beams=3, use_cache=use, **options) for use in (True, False)]
    seen["beams"] = torch.equal(*beams)
    seen["hidden"] = len(model(short, output_hidden_states=True).hidden_states)
    return seen


def see_training(model: Any, ids: torch.Tensor, eos: int) -> Seen:
    ids = ids[:, :16].clone()
    ids[:, 3] = eos
    grads = []
    for enabled in (False, True):
        model.train()
        model.gradient_checkpointing_enable() if enabled else None
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        grads.append(model.get_input_embeddings().weight.grad.clone())
    model.gradient_checkpointing_disable()
    model.eval()
    return {"loss": loss.item(), "eos_grad": grads[0][eos].abs().sum().item(), "recompute": torch.equal(*grads)}


def see_chat(model: Any, tokenizer: Any, conversations: list[Seen], options: Seen) -> Seen:
    seen: Seen = {"prompts": [], "answers": [], "streams": [], "histories": []}
    for asked in conversations:
        history = [tuple(pair) for pair in asked["history"]]
        given = {"meta_instruction": asked.get("meta"), **options}
        before = list(history)
        inputs = model.build_inputs(tokenizer, asked["query"], history, asked.get("meta"))
        seen["prompts"].append(inputs["input_ids"][0].tolist())
        response, longer = model.chat(tokenizer, asked["query"], history=history, **given)
        seen["answers"].append(response)
        seen["histories"].append(longer == [*before, (asked["query"], response)] and history == before)
        pieces = []
        for response, longer in model.stream_chat(tokenizer, asked["query"], history, **given):
            assert longer == [*before, (asked["query"], response)]
            pieces.append(response)
        seen["streams"].append(pieces)
    return seen


def see_ends(model: Any, tokenizer: Any) -> Seen:
    """Return how streams end: left early, never begun, failed; and that sampling is the same in both ways."""
    seen: Seen = {}
    long = {"max_new_tokens": 400, "eos_token_id": [10**6], "pad_token_id": 0}
    counter = Counter()
    for number, _ in enumerate(model.stream_chat(tokenizer, "hello", [], logits_processor=wrap(counter), **long)):
        if number == 3:
            break
    gc.collect()
    seen["left"] = (streams_running(), counter.steps)
    abandoned = model.stream_chat(tokenizer, "hello", [], **long)
    seen["first"] = next(abandoned)
    del abandoned
    gc.collect()
    seen["abandoned"] = streams_running()
    pieces = []
    try:
        for response, _ in model.stream_chat(tokenizer, "hello", [], logits_processor=wrap(Counter(4)), **long):
            pieces.append(response)
    except RuntimeError as error:
        seen["error"] = (str(error), len(pieces), streams_running())
    texts = []
    for _ in range(2):
        torch.manual_seed(5)
        texts.append(model.chat(tokenizer, "hello", [], max_new_tokens=20)[0])
    torch.manual_seed(5)
    texts.append([response for response, _ in model.stream_chat(tokenizer, "hello", [], max_new_tokens=20)][-1])
    torch.manual_seed(6)
    texts.append(model.chat(tokenizer, "hello", [], max_new_tokens=20)[0])
    seen["sampled"] = texts
    half = copy.deepcopy(model).half()
    seen["half"] = half.chat(tokenizer, "hello", [], max_new_tokens=4, do_sample=False)[0]
    return seen


def wrap(counter: Counter) -> LogitsProcessorList:
    return LogitsProcessorList([counter])


def see_saved(model: Any, tokenizer: Any, ids: torch.Tensor, text: str) -> bool:
    """Return whether what Transformers itself saves loads again, and is the same."""
    with tempfile.TemporaryDirectory(prefix="saved_") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        coder = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            same = torch.equal(again(ids).logits, model(ids).logits)
        return same and coder(text)["input_ids"] == tokenizer(text)["input_ids"]


def see(case: Seen) -> Seen:
    folder = case["folder"]
    # The lines of the InternLM README.
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model = model.eval()
    other = AutoModel.from_pretrained(folder, trust_remote_code=True)
    seen: Seen = {"classes": [type(one).__name__ for one in (model, other, tokenizer)]}
    seen |= see_tokenizer(tokenizer, case["texts"])
    if "ids" in case:
        seen |= see_model(model, case["ids"])
        seen |= see_training(model, case["ids"], tokenizer.eos_token_id)
        seen["saved"] = see_saved(model, tokenizer, case["ids"], case["texts"][0])
    if case.get("conversations"):
        seen |= see_chat(model, tokenizer, case["conversations"], case["options"])
    if "readme" in case:
        ids = tokenizer(case["readme"], return_tensors="pt")["input_ids"]
        response, history = other.eval().chat(tokenizer, "hello", history=[], max_new_tokens=3)
        seen["readme"] = (ids, other(ids).logits.detach(), history == [("hello", response)])
    if case.get("ends"):
        seen |= see_ends(model, tokenizer)
    return seen


def main() -> None:
    # A fork of a process that has imported the package: the folders' code must not find it.
    known = [name for name in sys.modules if name.partition(".")[0] == "internlm"]
    sys.modules.update(dict.fromkeys(["internlm", *known]))  # type: ignore[arg-type]
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    cases = torch.load(sys.argv[1])
    torch.save({"version": transformers.__version__, **{name: see(case) for name, case in cases.items()}}, sys.argv[2])


if __name__ == "__main__":
    main()
