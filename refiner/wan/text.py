"""Prompts to context: the umT5 encoder as Wan2.1 uses it, with a cache on disk so that it need not
be loaded twice."""

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
    """A text encoder from a Hugging Face folder, ComfyUI's umt5_xxl .safetensors or Wan2.1's .pth;
    nothing is fetched.

    The weights (11 GB for umT5-xxl in bf16) are read at the first prompt that is not in
    `cache_dir`. `tokenizer` is a file or folder; None looks inside the file, then beside it. dtype
    None runs as stored (fp8: bf16). Raises ValueError in one line when the file is something else
    or no tokenizer is found.
    """
    if text_len < 1:
        raise ValueError(f"text_len {text_len}: a context has at least 1 token, Wan2.1 uses 512")
    source = open_umt5(path)
    found = find_tokenizer(Path(path), tokenizer, source.tokenizer)
    return TextEncoder(source, found, source.choose_dtype(dtype), device, text_len, cache_dir)


class TextEncoder:
    """Encodes prompts to [B, text_len, text_dim], zeros behind each prompt's end; Wan2.1 attends to
    those too."""

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
        """Context [B, text_len, text_dim] in the encoder's dtype and on its device; one prompt
        never changes another's.

        Raises ValueError for no prompts, a bare string, or a tokenizer that does not fit.
        """
        if (
            isinstance(prompts, str)
            or not prompts
            or not all(isinstance(prompt, str) for prompt in prompts)
        ):
            raise ValueError(f"prompts are {prompts!r:.60}: give a list of at least one string")
        context = torch.zeros(
            len(prompts), self.text_len, self.text_dim, dtype=self.dtype, device=self.device
        )
        for row, prompt in zip(context, prompts, strict=True):
            tokens = self._tokens_context(clean(prompt))
            row[: len(tokens)] = tokens
        return context

    def release(self) -> None:
        """Frees the encoder's weights; the next prompt that is not in the cache reads them
        again."""
        self._model = None

    def _tokens_context(self, prompt: str) -> Tensor:
        """[n, text_dim] of a cleaned prompt's n tokens, from the cache when it is there."""
        if self._cache_dir is None:
            return self._run(prompt)
        key = json.dumps([*self._fingerprint, self.text_len, prompt])
        path = self._cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
        tokens = self._cached(path)
        if (
            tokens is not None and len(tokens) == self.text_len
        ):  # of a prompt that may have been cut
            self._tokenizer.warn_if_cut(prompt, self.text_len)
        if tokens is None:
            tokens = self._run(prompt)
            self._cache_dir.mkdir(parents=True, exist_ok=True)
            save_safetensors(path, {"context": tokens}, {"prompt": prompt})
        return tokens

    def _cached(self, path: Path) -> Tensor | None:
        """A cached context, or None when there is none that can be used."""
        try:
            file = open_weights(path)
        except ValueError:
            return None
        tensor = file.groups[FLAT].get("context") if FLAT in file.groups else None
        right = tensor is not None and tensor.ndim == 2 and 0 < len(tensor) <= self.text_len
        if not right or tensor.shape[1] != self.text_dim or tensor.dtype != self.dtype:
            return None
        return file.read(FLAT, "context")

    def _run(self, prompt: str) -> Tensor:
        ids, count = self._tokenizer(prompt, self.text_len)
        vocabulary = self._source.sizes["vocab_size"]
        if int(ids.max()) >= vocabulary:
            raise ValueError(
                f"{self._tokenizer.source} gives token {int(ids.max())}, but the encoder knows {vocabulary}: "
                "pass the tokenizer of this encoder"
            )
        if self._model is None:
            self._model = self._source.load(self.dtype, self.device)
        mask = (torch.arange(self.text_len) < count)[None].long()
        output = self._model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        return output.last_hidden_state[0, :count]
