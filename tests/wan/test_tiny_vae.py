"""The tiny decoder: names and sizes of the published file, any split in time, files refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autorefiner.refiner.wan import tiny_vae
from autorefiner.refiner.wan.latent_statistics import raw_latents
from autorefiner.refiner.wan.tiny_vae import TinyVAE, load_tiny_vae
from autorefiner.refiner.wan.vae_layers import StreamState

SMALL = (6, 5, 4, 3)


def decoder(raw: bool = False) -> TinyVAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyVAE(SMALL, raw).eval().requires_grad_(False)


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 16, 4, 2, 3, generator=torch.Generator().manual_seed(0))


def test_names_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(one.shape) for name, one in TinyVAE().state_dict().items()}
    assert len(shapes) == 64
    assert shapes["decoder.1.weight"] == (256, 16, 3, 3)
    assert shapes["decoder.5.conv.0.weight"] == (256, 512, 3, 3)
    assert shapes["decoder.8.weight"] == (128, 256, 3, 3) and "decoder.8.bias" not in shapes
    assert shapes["decoder.7.conv.weight"] == (256, 256, 1, 1)
    assert shapes["decoder.13.conv.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.19.conv.weight"] == (128, 64, 1, 1)
    assert shapes["decoder.22.weight"] == (3, 64, 3, 3)


def test_sizes_are_read_off_the_weights(latents) -> None:
    model = decoder()
    again = TinyVAE.from_state_dict(model.state_dict() | {"encoder.0.weight": torch.zeros(1)})
    assert torch.equal(again.decode(latents), model.decode(latents))


@pytest.mark.parametrize("split", [(4,), (1, 1, 1, 1), (1, 3), (2, 2)], ids=str)
@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_every_split_decodes_to_the_same_pixels(latents, split, at_once, monkeypatch) -> None:
    model, state = decoder(), StreamState()
    whole = model.decode(latents)
    assert whole.shape == (2, 3, 13, 16, 24) and whole.std() > 0.01
    monkeypatch.setattr(tiny_vae, "ACTIVATIONS_AT_ONCE", at_once)
    pieces = [model.decode(piece, state) for piece in latents.split(split, dim=2)]
    assert [piece.shape[2] for piece in pieces] == [
        4 * n - 3 * (i < 1) for i, n in enumerate(split)
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, atol=1e-6, rtol=0)


def test_a_frame_sees_the_past_and_never_the_future(latents) -> None:
    model, other = decoder(), latents.clone()
    other[:, :, 2] += 1
    changed = (model.decode(other) != model.decode(latents)).flatten(3).any(dim=3).any(dim=1)[0]
    assert not changed[:5].any() and changed[5:].all()


def test_weights_for_raw_latents_take_normalised_ones_too(latents) -> None:
    raw = decoder(raw=True).decode(latents)
    assert torch.equal(raw, decoder().decode(raw_latents(latents)))


def test_a_file_is_read_as_stored(latents, tmp_path) -> None:
    model = decoder().to(torch.bfloat16)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    read = load_tiny_vae(tmp_path / "a.safetensors", raw=True)
    assert read.decoder[1].weight.dtype == torch.bfloat16 and read.raw
    assert torch.equal(read.decode(latents), decoder(raw=True).bfloat16().decode(latents))


WEIGHTS = decoder().state_dict()
WRONG = {
    "another model": {"decoder.head.0.gamma": torch.zeros(4, 1, 1, 1)},
    "a tensor too few": {name: WEIGHTS[name] for name in WEIGHTS if name != "decoder.1.bias"},
    "no block": {name: WEIGHTS[name] for name in WEIGHTS if not name.startswith("decoder.3.")},
    "a tensor too many": WEIGHTS | {"decoder.99.weight": torch.zeros(1)},
    "another shape": WEIGHTS | {"decoder.3.conv.2.weight": torch.zeros(6, 7, 3, 3)},
    "integers": WEIGHTS | {"decoder.1.bias": torch.zeros(6, dtype=torch.int32)},
    "latents of 48 channels": WEIGHTS | {"decoder.1.weight": torch.zeros(6, 48, 3, 3)},
    "a width of none": WEIGHTS | {"decoder.1.weight": torch.zeros(0, 16, 3, 3)},
    "a width beyond all": WEIGHTS | {"decoder.1.weight": torch.zeros(4096, 16, 1, 1)},
}


@pytest.mark.parametrize("weights", WRONG.values(), ids=WRONG)
def test_other_weights_are_refused_in_one_line(weights, tmp_path) -> None:
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="tiny decoder") as error:
        load_tiny_vae(tmp_path / "a.safetensors")
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 500


def test_other_files_are_refused(tmp_path: Path) -> None:
    pickled, text = tmp_path / "a.pth", tmp_path / "b.safetensors"
    torch.save(WEIGHTS, pickled)
    text.write_text("not weights")
    for path in (pickled, text, tmp_path / "missing.safetensors"):
        with pytest.raises(ValueError, match="safetensors"):
            load_tiny_vae(path)


@pytest.mark.parametrize("shape", [(1, 16, 2, 2), (1, 4, 1, 2, 2), (1, 16, 0, 2, 2)])
def test_latents_of_another_shape_are_refused(shape) -> None:
    with pytest.raises(ValueError, match="latents"):
        decoder().decode(torch.zeros(shape))
