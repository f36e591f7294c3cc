"""Prompts to context: the umT5 encoder as Wan2.1 uses it, with an optional cache on disk."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from .tokenizer import Tokenizer, clean, find_tokenizer
from .umt5 import Umt5File, open_umt5
from .weight_file import FLAT, open_weights, save_safetensors


def load_text_encoder(
    path: Path | str,
    tokenizer: Path | str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    text_len: int = 512,
    cache_dir: Path | str | None = None,
) -> "TextEncoder":
    """Open a Hugging Face folder, ComfyUI's umt5_xxl .safetensors or Wan2.1's .pth; no downloads.

    The weights (11 GB for umT5-xxl in bf16) are read at the first prompt that is not in
    `cache_dir`. `tokenizer` is a file or folder; None looks inside the file, then beside it. dtype
    None runs as stored (fp8: bf16). Raises ValueError in one line for another kind of file, or
    without a tokenizer.
    """
    if text_len < 1:
        raise ValueError(f"text_len {text_len}: a context has at least 1 token, Wan2.1 uses 512")
    source = open_umt5(path)
    return TextEncoder(
        source,
        find_tokenizer(Path(path), tokenizer, source.tokenizer),
        source.choose_dtype(dtype),
        device,
        text_len,
        cache_dir,
    )


class TextEncoder:
    """Encode prompts to [B, text_len, text_dim], padded with zeros, which Wan2.1 attends to."""

    def __init__(
        self,
        source: Umt5File,
        tokenizer: Tokenizer,
        dtype: torch.dtype,
        device: torch.device | str,
        text_len: int,
        cache_dir: Path | str | None,
    ) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self.text_len = text_len
        self.text_dim = source.text_dim
        self._source = source
        self._tokenizer = tokenizer
        self._cache_dir = Path(cache_dir) if cache_dir is not None else None
        self._fingerprint = (
            [source.fingerprint(), tokenizer.digest, str(dtype)] if cache_dir is not None else []
        )
        self._model: torch.nn.Module | None = None

    def encode(self, prompts: list[str]) -> Tensor:
        """Return context [B, text_len, text_dim] in the encoder's dtype and on its device.

        Each prompt is encoded by itself. Raises ValueError for no prompts, a bare string, or a
        tokenizer that does not fit.
        """
        is_list = not isinstance(prompts, str) and bool(prompts)
        if not is_list or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts are {prompts!r:.60}: give a list of at least one string")
        context = torch.zeros(
            len(prompts), self.text_len, self.text_dim, dtype=self.dtype, device=self.device
        )
        for row, prompt in zip(context, prompts, strict=True):
            tokens = self._context(clean(prompt))
            row[: len(tokens)] = tokens
        return context

    def release(self) -> None:
        """Free the encoder's weights; the next prompt that is not cached reads them again."""
        self._model = None

    def _context(self, prompt: str) -> Tensor:
        """Return the context [n, text_dim] of a cleaned prompt's n tokens, using the cache."""
        if self._cache_dir is None:
            return self._run(prompt)
        key = json.dumps([*self._fingerprint, self.text_len, prompt])
        path = self._cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
        tokens = self._cached(path)
        # A cached context of full length may come from a prompt that was cut.
        if tokens is not None and len(tokens) == self.text_len:
            self._tokenizer.warn_if_cut(prompt, self.text_len)
        if tokens is None:
            tokens = self._run(prompt)
            self._cache_dir.mkdir(parents=True, exist_ok=True)
            save_safetensors(path, {"context": tokens}, {"prompt": prompt})
        return tokens

    def _cached(self, path: Path) -> Tensor | None:
        """Read a cached context; None when there is none, or it does not fit."""
        try:
            file = open_weights(path)
        except ValueError:
            return None
        tensor = file.groups[FLAT].get("context") if FLAT in file.groups else None
        if tensor is None or tensor.ndim != 2 or not 0 < len(tensor) <= self.text_len:
            return None
        if tensor.shape[1] != self.text_dim or tensor.dtype != self.dtype:
            return None
        return file.read(FLAT, "context")

    def _run(self, prompt: str) -> Tensor:
        ids, count = self._tokenizer(prompt, self.text_len)
        vocabulary = self._source.sizes["vocab_size"]
        if int(ids.max()) >= vocabulary:
            raise ValueError(
                f"{self._tokenizer.source} gives token {int(ids.max())}, but the encoder knows"
                f" {vocabulary}: pass the tokenizer of this encoder"
            )
        if self._model is None:
            self._model = self._source.load(self.dtype, self.device)
        mask = (torch.arange(self.text_len) < count)[None].long()
        output = self._model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        return output.last_hidden_state[0, :count]
