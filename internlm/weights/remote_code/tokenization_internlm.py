"""The SentencePiece tokenizer of InternLM for Transformers.

    tokenizer("hello")["input_ids"]        # bos, then the ids of SentencePiece; no eos
    tokenizer.text_ids("<eoa>")            # ids of these characters: what a user types is never structure

A text that begins with bos gets no second one, so that a rendered chat template may be encoded as it is. Decoding joins
the bytes of the pieces: what was encoded comes back, spaces included.
"""

import os
import re
import shutil

import sentencepiece
from transformers import AddedToken
from transformers.tokenization_utils import PreTrainedTokenizer

SPACE = "\u2581"
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # SentencePiece.Type of sentencepiece_model.proto


class InternLMTokenizer(PreTrainedTokenizer):
    """SentencePiece, with bos put before a text.

    Args:
        vocab_file: the SentencePiece model.
        unk_token, bos_token, eos_token: names of pieces; None: as the model says.
        pad_token: None: eos, so that batches can be padded.
        add_bos_token, add_eos_token: whether bos is put before a text, and eos after it.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]
    _auto_class = "AutoTokenizer"  # save_pretrained copies the code
    padding_side = "left"  # answers go on where the text ends

    def __init__(
        self,
        vocab_file,
        unk_token=None,
        bos_token=None,
        eos_token=None,
        pad_token=None,
        add_bos_token=True,
        add_eos_token=False,
        **kwargs,
    ):
        # Before the parent, which looks up its special tokens since Transformers 4.34.
        self.vocab_file = vocab_file
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        self.sp_model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        data = self.sp_model.serialized_model_proto()
        # Serialised messages merge when they are joined: this sets normalizer_spec.add_dummy_prefix = false.
        self._inner = sentencepiece.SentencePieceProcessor(model_proto=data + b"\x1a\x02\x18\x00")
        self._pieces = [self.sp_model.id_to_piece(id_) for id_ in range(self.sp_model.get_piece_size())]
        self._ids = {piece: id_ for id_, piece in enumerate(self._pieces)}
        kinds = _kinds(data)
        self._bytes = [_bytes(piece, kind) for piece, kind in zip(self._pieces, kinds)]
        self.structure = {
            piece.replace(SPACE, " "): self._ids[piece]
            for piece, kind in zip(self._pieces, kinds)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) and len(piece) > 1 and not piece.replace(SPACE, " ").isspace()
        }
        self._has_bytes = BYTE in kinds
        self._has_prefix = self.sp_model.encode("a") != self._inner.encode("a")
        names = sorted(self.structure, key=len, reverse=True)
        self._name_starts = re.compile("(?=" + "|".join(map(re.escape, names)) + ")")
        eos_token = eos_token or self._piece(self.sp_model.eos_id())
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        if "added_tokens_decoder" in kwargs:  # of a tokenizer.json too; what SentencePiece has, it matches itself
            added = kwargs["added_tokens_decoder"].items()
            kwargs["added_tokens_decoder"] = {id_: token for id_, token in added if int(id_) >= len(self._pieces)}
        super().__init__(
            unk_token=_exact(unk_token or self._piece(self.sp_model.unk_id())),
            bos_token=_exact(bos_token or self._piece(self.sp_model.bos_id())),
            eos_token=_exact(eos_token),
            pad_token=_exact(pad_token or eos_token),
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            **kwargs,
        )

    def _piece(self, id_):
        return self._pieces[id_] if id_ >= 0 else None

    @property
    def vocab_size(self):
        """Return the number of pieces."""
        return len(self._pieces)

    def get_vocab(self):
        """Return the id of every piece and added token."""
        return {**self._ids, **self.get_added_vocab()}

    def text_ids(self, text):
        """Return the ids of plain text: no bos, and no token of structure, whatever the text says.

        The text is cut after the first character of every name of structure in it. A typed U+2581, which SentencePiece
        takes for a space, is written in bytes.
        """
        ids = self.sp_model.encode(text)
        has_mark = self._has_bytes and SPACE in text
        structure = set(self.structure.values())
        if not has_mark and structure.isdisjoint(ids):
            return ids
        cuts = {0, len(text)} | {match.start() + 1 for match in self._name_starts.finditer(text)}
        if has_mark:
            cuts |= {at for match in re.finditer(SPACE, text) for at in match.span()}
        order, ids = sorted(cuts), []
        for start, end in zip(order, order[1:]):
            part = text[start:end]
            if has_mark and part == SPACE:
                ids += [self._ids[f"<0x{byte:02X}>"] for byte in part.encode()]
            else:
                ids += (self._inner if start else self.sp_model).encode(part)
        return [id_ for id_ in ids if id_ not in structure]

    def _tokenize(self, text, **kwargs):
        return [self._pieces[id_] for id_ in self.sp_model.encode(text)]

    def _convert_token_to_id(self, token):
        return self._ids.get(token, self.sp_model.unk_id())

    def _convert_id_to_token(self, index):
        return self._pieces[index]

    def convert_tokens_to_string(self, tokens):
        """Return the text of pieces."""
        return self._text([self.convert_tokens_to_ids(token) for token in tokens])

    def _decode(self, token_ids, skip_special_tokens=False, **kwargs):
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        silent = set(self.all_special_ids) if skip_special_tokens else ()
        return self._text([id_ for id_ in ids if id_ not in silent])

    def _text(self, ids):
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
        size = len(self._bytes)
        parts = [self._bytes[id_] if id_ < size else self.convert_ids_to_tokens(id_).encode() for id_ in ids]
        joined = b"".join(parts)
        if self._has_prefix and joined[:1] == b" ":
            joined = joined[1:]
        return joined.decode("utf-8", "replace")

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        """Return ids with bos before them, where they have none yet, and eos after them where that is asked for."""
        bos = [self.bos_token_id] if self.add_bos_token and self.bos_token_id is not None else []
        eos = [self.eos_token_id] if self.add_eos_token and self.eos_token_id is not None else []
        first = token_ids_0 if token_ids_0[:1] == bos else bos + token_ids_0
        return first + eos if token_ids_1 is None else first + eos + token_ids_1 + eos

    def create_token_type_ids_from_sequences(self, token_ids_0, token_ids_1=None):
        """Return zeros: the model has one type of token."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
        """Return 1 for what stands around a text, 0 for the text."""
        ids = token_ids_0
        if not already_has_special_tokens:
            ids = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [int(id_ in (self.bos_token_id, self.eos_token_id)) for id_ in ids]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        """Write the SentencePiece model into a folder, and return its path."""
        name = (filename_prefix + "-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        path = os.path.join(save_directory, name)
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)


def _exact(token):
    """Return a token that takes no white space from the text beside it."""
    return AddedToken(token, lstrip=False, rstrip=False, normalized=False) if isinstance(token, str) else token


def _bytes(piece, kind):
    """Return the bytes that a piece stands for."""
    return bytes([int(piece[3:5], 16)]) if kind == BYTE else piece.replace(SPACE, " ").encode()


def _kinds(model):
    """Return the kind of each piece of a serialised model; the library does not tell user-defined from normal."""
    kinds = []
    for number, piece in _fields(model):
        if number == 1:
            kinds.append(next((value for inner, value in _fields(piece) if inner == 3), 1))
    return kinds


def _fields(message):
    """Yield (field number, value) of a protobuf message."""
    at = 0
    while at < len(message):
        tag, at = _number(message, at)
        if tag & 7 == 0:
            value, at = _number(message, at)
        else:
            size, at = {1: (8, at), 5: (4, at)}.get(tag & 7) or _number(message, at)
            value, at = message[at : at + size], at + size
        yield tag >> 3, value


def _number(message, at):
    """Return a variable-length integer and where it ends."""
    value = shift = 0
    while True:
        value |= (message[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if message[at - 1] < 0x80:
            return value, at
