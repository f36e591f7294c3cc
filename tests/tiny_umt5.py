"""A small random umT5 as a Hugging Face folder, its tokenizers, and reference outputs."""

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.wan.text import load_text_encoder
from autorefiner.refiner.wan.tokenizer import PIP_LINE

transformers = pytest.importorskip(
    "transformers", reason=f"the text encoder needs transformers: {PIP_LINE}"
)
tokenizers = pytest.importorskip(
    "tokenizers", reason=f"the text encoder needs tokenizers: {PIP_LINE}"
)
sentencepiece = pytest.importorskip(
    "sentencepiece", reason=f"the text encoder needs sentencepiece: {PIP_LINE}"
)

WORDS = ["a", "red", "circle", "moves", "to", "the", "left", "slowly", "&"]
VOCABULARY = 64
TEXT_LEN = 12
PROMPTS = ["a red circle moves", "the circle", ""]


def make_tokenizer(words: list[str] = WORDS) -> "tokenizers.Tokenizer":
    ids = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ids["</s>"])]
    )
    return tokenizer


def write_umt5(path: Path) -> None:
    """Write config.json, model.safetensors and tokenizer.json."""
    config = transformers.UMT5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=3,
        relative_attention_max_distance=64,
    )
    model = transformers.UMT5EncoderModel(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    model.save_pretrained(path)
    make_tokenizer().save(str(path / "tokenizer.json"))


def expected(folder: Path, prompts: list[str], text_len: int = TEXT_LEN) -> Tensor:
    """Return the context that transformers' own classes compute."""
    model = transformers.UMT5EncoderModel.from_pretrained(folder).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    rows = []
    for prompt in prompts:
        batch = tokenizer(
            prompt, padding="max_length", max_length=text_len, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            output = model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        rows.append(output * batch.attention_mask[..., None])
    return torch.cat(rows)


def error(*args, **options) -> str:
    """Return the error of loading an encoder and encoding with it, which must be one line."""
    with pytest.raises(ValueError) as raised:
        load_text_encoder(*args, **options).encode(["a red circle"])
    assert "\n" not in str(raised.value)
    return str(raised.value)


def spiece_model() -> bytes:
    """Return a sentencepiece model with T5's special ids."""
    model = io.BytesIO()
    text = iter([" ".join(WORDS)] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_writer=model, vocab_size=40, hard_vocab_limit=False, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()
