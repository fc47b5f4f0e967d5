r"""`model.chat` and `model.stream_chat`.

    <s><|User|>:hello\n<|Bot|>:            ids of special tokens and the text between them, as config.chat_format says
                              Hi.<eoa>   written by `generate` until a stop

Only what the format itself says is structure. A message is text, whatever is typed in it.
"""

import queue
import threading

import torch


class ChatMixin:
    """What a model that can `generate` needs to talk."""

    def build_inputs(self, tokenizer, query, history=None, meta_instruction=None):
        """Return input_ids and attention_mask of a conversation that the model answers next.

        Args:
            tokenizer: of this folder.
            query: what the user says.
            history: earlier (query, response) pairs.
            meta_instruction: the system message; None: that of the format; "": none.

        Raises:
            ValueError: the model has no chat format, or its format has no place for what is asked.
        """
        form = self._chat_format()
        writer = _Writer(tokenizer)
        if form["bos"] is not None:
            writer.add(form["bos"])
        if meta_instruction and form["system"] is None:
            raise ValueError("the chat format of this model has no system message: leave meta_instruction out")
        if history and form.get("single_turn"):
            raise ValueError("the chat format of this model has one question and one answer: leave history out")
        system = form["default_system"] if meta_instruction is None else meta_instruction
        if system and form["system"] is not None:
            writer.add(*form["system"][0], system, *form["system"][1])
        before, after = form["assistant"]
        end = max((n + 1 for n, part in enumerate(after) if isinstance(part, int)), default=0)
        for asked, answer in history or []:
            writer.add(*form["user"][0], asked, *form["user"][1], *before)
            writer.cut()  # an answer is encoded by itself, as it was written
            writer.add(answer, *after[:end])
            writer.cut()
            writer.add(*after[end:])
        writer.add(*form["user"][0], query, *form["user"][1], *before)
        writer.cut()
        ids = torch.tensor([writer.ids], device=self.get_input_embeddings().weight.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @torch.no_grad()
    def chat(
        self,
        tokenizer,
        query,
        history=None,
        streamer=None,
        max_new_tokens=1024,
        do_sample=True,
        temperature=0.8,
        top_p=0.8,
        meta_instruction=None,
        **kwargs,
    ):
        """Return the answer, and the history with it.

        Args:
            tokenizer, query, history, meta_instruction: as of `build_inputs`; the history is not changed.
            streamer, max_new_tokens, do_sample, temperature, top_p, kwargs: as of `generate`.

        Raises:
            ValueError: as `build_inputs`.
        """
        inputs = self.build_inputs(tokenizer, query, history, meta_instruction)
        options = {"max_new_tokens": max_new_tokens, "do_sample": bool(do_sample and temperature > 0), **kwargs}
        if options["do_sample"]:
            options.update(temperature=temperature, top_p=top_p)
        stops = self._stops(options)
        options.setdefault("pad_token_id", tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0])
        output = self.generate(**inputs, streamer=streamer, **options)
        response = _answer(tokenizer, output[0][inputs["input_ids"].shape[1] :].tolist(), stops)
        return response, [*(history or []), (query, response)]

    def stream_chat(
        self,
        tokenizer,
        query,
        history=None,
        max_new_tokens=1024,
        do_sample=True,
        temperature=0.8,
        top_p=0.8,
        meta_instruction=None,
        **kwargs,
    ):
        """Yield the answer so far and the history with it, from the empty answer to the whole one.

        Every answer begins with the one before it, and ends with a whole character. Generation runs in a thread: an
        error there is raised here, and leaving the loop ends it after the token in work. Arguments are those of `chat`.

        Raises:
            ValueError: as `build_inputs`.
        """
        history = list(history or [])
        stops = self._stops(kwargs)
        options = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "temperature": temperature, "top_p": top_p}
        options.update(kwargs, meta_instruction=meta_instruction)
        tokens, left = queue.Queue(), threading.Event()
        streamer = _Streamer(tokens, left)

        def produce():
            try:
                self.chat(tokenizer, query, history, streamer=streamer, **options)
                tokens.put(None)
            except BaseException as error:  # whatever it is, it belongs to the consumer
                tokens.put(error)

        thread = threading.Thread(target=produce, name="stream_chat", daemon=True)
        thread.start()
        ids, response, shown = [], "", None
        try:
            while True:
                if response != shown:
                    yield response, [*history, (query, response)]
                    shown = response
                token = tokens.get()
                if isinstance(token, BaseException):
                    raise token
                if token is None:
                    break
                ids.append(token)
                response = _answer(tokenizer, ids, stops).rstrip("\ufffd")  # the rest of a character is to come
            response = _answer(tokenizer, ids, stops)
            if response != shown:
                yield response, [*history, (query, response)]
        finally:
            left.set()
            thread.join()

    def _chat_format(self):
        if self.config.chat_format is None:
            raise ValueError("this model has no chat format: its config.json says none, and its tokenizer no <eoa>")
        return self.config.chat_format

    def _stops(self, options):
        """Return the ids that end an answer: as the caller says, else as the chat format does."""
        stops = options.setdefault("eos_token_id", list(self._chat_format()["stops"]))
        return stops if isinstance(stops, (list, tuple)) else [stops]


class _Left(Exception):
    """The consumer of a stream has left."""


class _Streamer:
    """Takes what `generate` writes: the prompt first, then each token."""

    def __init__(self, tokens, left):
        self.tokens, self.left, self.has_prompt = tokens, left, False

    def put(self, value):
        if self.left.is_set():
            raise _Left
        if self.has_prompt:
            for token in value.reshape(-1).tolist():
                self.tokens.put(token)
        self.has_prompt = True

    def end(self):
        pass


class _Writer:
    """Turns texts and ids into ids; texts that follow each other are encoded as one."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.text = tokenizer, [], ""

    def add(self, *parts):
        for part in parts:
            if isinstance(part, str):
                self.text += part
            else:
                self.cut()
                self.ids.append(part)

    def cut(self):
        if self.text:
            self.ids += _text_ids(self.tokenizer, self.text)
        self.text = ""


def _text_ids(tokenizer, text):
    """Return the ids of plain text, none of them a special token."""
    if hasattr(tokenizer, "text_ids"):
        return tokenizer.text_ids(text)
    added = {name: id_ for name, id_ in tokenizer.get_added_vocab().items() if len(name) > 1}
    told = getattr(tokenizer, "added_tokens_decoder", {})  # since Transformers 4.34; what is not special is text
    added = {name: id_ for name, id_ in added.items() if id_ not in told or told[id_].special}
    options = {"split_special_tokens": True} if hasattr(tokenizer, "split_special_tokens") else {}
    ids = tokenizer.encode(text, add_special_tokens=False, **options)
    if set(added.values()).isdisjoint(ids):
        return ids
    # Fast tokenizers of Transformers before 4.42 cannot be told: names are cut after their first character.
    cuts = {0, len(text)} | {at + 1 for name in added for at in range(len(text)) if text.startswith(name, at)}
    order = sorted(cuts)
    parts = [text[start:end] for start, end in zip(order, order[1:])]
    return [id_ for part in parts for id_ in tokenizer.encode(part, add_special_tokens=False)]


def _answer(tokenizer, ids, stops):
    """Return the text of an answer up to the first stop; special tokens are silent."""
    end = next((n for n, id_ in enumerate(ids) if id_ in stops), len(ids))
    silent = set(getattr(tokenizer, "structure", {}).values())
    said = [id_ for id_ in ids[:end] if id_ not in silent]
    return tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
