"""A tokenizer in the format of Hugging Face's ``tokenizers``, with a chat template: what any backend needs of text.

The caller's text never becomes special tokens: those come from the chat template, or as token ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from headrace.backends.api import Encoding
from headrace.backends.chat_template import ChatTemplate
from headrace.backends.dialect import PLAIN, Mark
from headrace.backends.errors import InvalidArgument, UnsupportedOption
from headrace.backends.requests import ChatInput

if TYPE_CHECKING:
    from headrace.backends.onnx.bundle import Manifest

_SPACE = "▁"
"""SentencePiece's mark of a space."""
_LEAD = "\x01"
"""Stands where a text would begin: it takes the space that SentencePiece puts in front, and merges with nothing."""


class HuggingFaceTokenizer:
    """Implements ``api.Tokenizer`` for byte-level BPE and for SentencePiece BPE. Safe to use from several threads;
    encoding lets go of the interpreter's lock.
    """

    quick_characters = 256

    def __init__(
        self,
        tokenizer_json: str,
        *,
        model: str,
        backend: str,
        chat_template: str | None = None,
        eos_token_ids: Sequence[int] = (),
        bos_token_id: int | None = None,
        add_bos_token: bool = False,
        infill_token_ids: tuple[int, int, int] | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``model`` and ``backend`` are for messages; the first of ``eos_token_ids`` is the one that chat templates
        call ``eos_token``; ``infill_token_ids`` come before the prefix, the suffix and what fills the hole; ``now`` is
        for templates that give the date. Raises ValueError if a text is no tokenizer or no template.
        """
        description = json.loads(tokenizer_json)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as exc:  # the library raises nothing narrower
            raise ValueError(f"tokenizer: {exc}") from exc
        # Marks of special tokens in a text are text.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}
        unknown = self._tokenizer.token_to_id(description["model"].get("unk_token") or "")
        self._never_in_text = frozenset(self._special) - {unknown}
        self._special_ids = {content: token_id for token_id, content in self._special.items()}
        self._bytes = _bytes_of_tokens(self._tokenizer, description)
        self._drops_leading_space = _drops_leading_space(description["decoder"])
        self.vocabulary_size = len(self._bytes)
        self.eos_token_ids = frozenset(eos_token_ids)
        self._bos_token_id = bos_token_id if add_bos_token else None
        self._infill_token_ids = infill_token_ids
        self.can_infill = infill_token_ids is not None
        self._model, self._backend = model, backend
        self._template: ChatTemplate | None = None
        self.dialect = PLAIN
        if chat_template is not None:
            named = {"bos_token": bos_token_id, "eos_token": next(iter(eos_token_ids), None)}
            self._template = ChatTemplate(
                chat_template,
                special_tokens=list(self._special_ids),
                variables={name: self._special.get(i, "") for name, i in named.items() if i is not None},
                now=now,
            )
            self.dialect = self._template.dialect(self._mark)

    @classmethod
    def from_bundle(cls, folder: Path, manifest: Manifest, *, backend: str = "onnx") -> HuggingFaceTokenizer:
        """The tokenizer of a model bundle. Raises ValueError, OSError."""
        template = folder / "chat_template.jinja"
        return cls(
            (folder / "tokenizer.json").read_text(encoding="utf-8"),
            model=manifest.name,
            backend=backend,
            chat_template=template.read_text(encoding="utf-8") if template.name in manifest.files else None,
            eos_token_ids=manifest.eos_token_ids,
            bos_token_id=manifest.bos_token_id,
            add_bos_token=manifest.add_bos_token,
            infill_token_ids=manifest.infill_token_ids,
        )

    def encode(self, text: str) -> Encoding:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        if self._bos_token_id is not None:
            ids.append(self._bos_token_id)
            spans.append((0, 0))
        self._append_plain(text, 0, ids, spans)
        return Encoding(text, tuple(ids), tuple(spans))

    def encode_chat(self, chat: ChatInput) -> Encoding:
        if self._template is None:
            raise UnsupportedOption("chat", model=self._model, backend=self._backend)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        start = 0
        pieces = self._template.render(chat)
        for piece in pieces:
            if piece.is_special:
                ids.append(self._special_ids[piece.text])
                spans.append((start, start + len(piece.text)))
            else:
                self._append_plain(piece.text, start, ids, spans)
            start += len(piece.text)
        return Encoding("".join(piece.text for piece in pieces), tuple(ids), tuple(spans))

    def encode_continuation(self, text: str) -> Encoding:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        self._append_continuation(text, 0, ids, spans)
        return Encoding(text, tuple(ids), tuple(spans))

    def encode_infill(self, prefix: str, suffix: str) -> Encoding:
        """The prefix, the suffix, then what fills the hole between them (Bavarian et al. 2022, arXiv 2207.14255)."""
        if self._infill_token_ids is None:
            raise RuntimeError("a text with a hole came to a tokenizer that cannot lay it out. This is a bug")
        ids = [] if self._bos_token_id is None else [self._bos_token_id]
        spans = [(0, 0)] * len(ids)
        text = ""
        parts = ((prefix, self._append_plain), (suffix, self._append_continuation), ("", self._append_continuation))
        for mark_id, (part, append) in zip(self._infill_token_ids, parts, strict=True):
            mark = self._special[mark_id]
            ids.append(mark_id)
            spans.append((len(text), len(text) + len(mark)))
            text += mark
            append(part, len(text), ids, spans)
            text += part
        return Encoding(text, tuple(ids), tuple(spans))

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if skip_special_tokens:
            data = b"".join(self._bytes[token_id] for token_id in token_ids)
        else:
            data = b"".join(
                self._special[token_id].encode() if token_id in self._special else self._bytes[token_id]
                for token_id in token_ids
            )
        if self._drops_leading_space:
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def _mark(self, text: str) -> Mark:
        if text in self._special_ids:
            return Mark(text, (self._special_ids[text],), is_control=True)
        token_id = self._tokenizer.token_to_id(text)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids if token_id is None else [token_id]
        return Mark(text, tuple(ids))

    def _append_plain(self, text: str, offset: int, ids: list[int], spans: list[tuple[int, int]]) -> None:
        cuts = [0, len(text)]
        while True:
            encodings = [
                (start, self._tokenizer.encode(text[start:end], add_special_tokens=False))
                for start, end in pairwise(cuts)
            ]
            if all(self._never_in_text.isdisjoint(encoding.ids) for _, encoding in encodings):
                break
            cuts = sorted({*cuts, *self._cuts_of_special(text, encodings)})
        for start, encoding in encodings:
            ids += encoding.ids
            shift = offset + start
            # A long prompt is one piece: not shifting it halves the time that other threads wait for this one.
            spans += [(shift + a, shift + b) for a, b in encoding.offsets] if shift else encoding.offsets

    def _append_continuation(self, text: str, offset: int, ids: list[int], spans: list[tuple[int, int]]) -> None:
        """As ``_append_plain``, without the space that SentencePiece puts in front."""
        lead = _LEAD if self._drops_leading_space else ""
        num_lead_ids = len(self._tokenizer.encode(lead, add_special_tokens=False).ids)
        behind_ids: list[int] = []
        behind_spans: list[tuple[int, int]] = []
        self._append_plain(lead + text, offset - len(lead), behind_ids, behind_spans)
        ids += behind_ids[num_lead_ids:]
        spans += behind_spans[num_lead_ids:]

    def _cuts_of_special(self, text: str, encodings: Sequence[tuple[int, Any]]) -> Iterator[int]:
        """Where to cut a text to be rid of special tokens that its own characters make: there are vocabularies that
        hold them among the words.
        """
        for start, encoding in encodings:
            for token_id, (a, b) in zip(encoding.ids, encoding.offsets, strict=True):
                if token_id in self._never_in_text:
                    if b - a < 2:
                        raise InvalidArgument(
                            "text", f"holds {text[start + a : start + b]!r}, which this model cannot read"
                        )
                    yield start + a + 1


# --- vocabularies --------------------------------------------------------------------------------------------------


def _bytes_of_tokens(tokenizer: tokenizers.Tokenizer, description: dict[str, Any]) -> list[bytes]:
    """What each token adds to the output, by id."""
    if description["model"]["type"] != "BPE":
        raise ValueError(f"tokenizer: unsupported model {description['model']['type']!r}; supported is 'BPE'")
    kinds = {step["type"] for step in _steps(description["decoder"])}
    if "ByteLevel" in kinds:
        to_bytes = _byte_level_bytes
    elif kinds & {"ByteFallback", "Metaspace", "Replace"}:
        to_bytes = _sentence_piece_bytes
    else:
        raise ValueError(f"tokenizer: unsupported decoder {sorted(kinds)}")
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    result = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        result[token_id] = to_bytes(token)
    for token_id, added in tokenizer.get_added_tokens_decoder().items():
        result[token_id] = b"" if added.special else added.content.encode()
    return result


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES_OF_CHARACTERS = _bytes_of_characters()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTES_OF_CHARACTERS[character] for character in token])
    except KeyError:
        return token.encode()


def _sentence_piece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace(_SPACE, " ").encode()


def _steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder is None:
        return
    yield decoder
    for step in decoder.get("decoders", ()):
        yield from _steps(step)


def _drops_leading_space(decoder: dict[str, Any]) -> bool:
    return any(
        (step["type"] == "Strip" and step["content"] == " " and step["start"] > 0)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in _steps(decoder)
    )
