"""Tokenizers of prompts: a tokenizer.json or a sentencepiece model, given or beside the encoder."""

import hashlib
import html
import re
import warnings
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..reading import TOKENIZER_BYTES, read_bytes

PIP_LINE = (
    'pip install "transformers>=4.50.3" "sentencepiece>=0.2" (or pip install "autorefiner[umt5]")'
)
FILES = ("tokenizer.json", "spiece.model")
SHOWN = 40  # characters of a prompt in a message
# Where Hugging Face, Wan2.1 and diffusers put the tokenizer.
FOLDERS = (".", "google/umt5-xxl", "tokenizer", "../tokenizer")


def clean(prompt: str) -> str:
    """Unescape HTML entities and collapse white space, as Wan's tokenizer does (without ftfy)."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


class Tokenizer:
    """A tokenizer file's bytes; the library that runs it is imported at the first prompt."""

    def __init__(self, data: bytes, source: str) -> None:
        self.data = data
        self.source = source
        self.digest = hashlib.sha256(data).hexdigest()

    def __call__(self, prompt: str, text_len: int) -> tuple[Tensor, int]:
        """Return ids [1, text_len], padded, and their number before padding.

        A prompt that is too long is cut, with a warning, and keeps the eos token.
        """
        encode, _, eos, pad = self._codec
        self.warn_if_cut(prompt, text_len)
        ids = [*encode(prompt)[: text_len - 1], eos]
        return torch.tensor([ids + [pad] * (text_len - len(ids))]), len(ids)

    def warn_if_cut(self, prompt: str, text_len: int) -> None:
        """Warn when a prompt has more tokens than the model reads, and say where it is cut."""
        encode, decode, _, _ = self._codec
        ids = encode(prompt)
        if len(ids) > text_len - 1:
            end = decode(ids[: text_len - 1])[-SHOWN:]
            warnings.warn(
                f"the prompt {prompt[:SHOWN]!r}… has {len(ids) + 1} tokens and the model reads"
                f" {text_len}: it ends after …{end!r}",
                stacklevel=2,
            )

    @cached_property
    def _codec(self):
        """Functions text -> ids and ids -> text, eos id, pad id."""
        try:
            is_json = self.data.lstrip()[:1] == b"{"
            codec = self._from_json() if is_json else self._from_sentencepiece()
        except ImportError as error:
            raise ValueError(
                f"the tokenizer needs a library that is missing ({error.name}): {PIP_LINE}"
            ) from error
        except Exception as error:  # both libraries raise bare exceptions
            raise ValueError(
                f"{self.source} is not a tokenizer that can be read: pass a tokenizer.json"
            ) from error
        eos = codec[2]
        if eos is None or eos < 0:
            raise ValueError(
                f"{self.source} has no </s> token, so it is not umT5's:"
                " pass google/umt5-xxl's tokenizer.json"
            )
        return codec

    def _from_json(self):
        from tokenizers import Tokenizer as JsonTokenizer

        tokenizer = JsonTokenizer.from_str(self.data.decode("utf-8"))
        tokenizer.no_padding()
        tokenizer.no_truncation()

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

        eos, pad = tokenizer.token_to_id("</s>"), tokenizer.token_to_id("<pad>")
        return encode, tokenizer.decode, eos, pad or 0

    def _from_sentencepiece(self):
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_proto=self.data)
        return processor.encode, processor.decode, processor.eos_id(), max(processor.pad_id(), 0)


def find_tokenizer(encoder: Path, given: Path | str | None, embedded: bytes | None) -> Tokenizer:
    """Return the given tokenizer, else the one in the encoder's file, else the one beside it.

    Raises ValueError in one line when there is none.
    """
    if given is None and embedded is not None:
        return Tokenizer(embedded, f"the tokenizer in {encoder}")
    place = Path(given) if given is not None else encoder
    if given is not None and place.is_file():
        return Tokenizer(read_bytes(place, TOKENIZER_BYTES), str(place))
    folder = place if place.is_dir() else place.parent
    if given is None or place.is_dir():
        for path in (folder / sub / name for sub in FOLDERS for name in FILES):
            if path.is_file():
                return Tokenizer(read_bytes(path, TOKENIZER_BYTES), str(path))
    raise ValueError(
        f"{place} has no tokenizer ({' or '.join(FILES)}) in or beside it: "
        "pass the tokenizer.json of google/umt5-xxl as the tokenizer"
    )
