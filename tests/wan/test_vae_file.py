"""VAE files in published layouts load under their original names; other files are refused."""

from pathlib import Path

import pytest
import torch
from published import State, make_state, prefixed, write
from safetensors.torch import load_file

from autorefiner.refiner.wan.checkpoint import load_vae_state

VAE_FILE = Path(__file__).parents[1] / "golden" / "vae_weights.safetensors"


@pytest.fixture(scope="module")
def state() -> State:
    return make_state()


@pytest.mark.parametrize(
    ("name", "prefix"), [("a.pth", ""), ("b.safetensors", "vae."), ("c.pt", "first_stage_model.")]
)
def test_vae_files(name: str, prefix: str, tmp_path: Path) -> None:
    right = load_file(VAE_FILE)
    loaded = load_vae_state(write(tmp_path / name, prefixed(right, prefix)))
    assert set(loaded) == set(right) and all(torch.equal(loaded[key], right[key]) for key in right)


def test_files_that_are_no_wan_vae(state: State, tmp_path: Path) -> None:
    whole = load_file(VAE_FILE)
    cases = {
        "video transformer": state,
        "diffusers": {"decoder.conv_in.weight": torch.zeros(1)},
        "48 latent": whole | {"conv2.weight": torch.zeros(48, 48, 1, 1, 1)},
        "0 latent": whole | {"conv2.weight": torch.zeros(())},
        "decoder.head.0.gamma": whole | {"decoder.head.0.gamma": torch.zeros(())},
        "known kind": {"a": torch.zeros(1)},
    }
    for number, (text, content) in enumerate(cases.items()):
        path = write(tmp_path / f"{number}.safetensors", content)
        with pytest.raises(ValueError) as raised:
            load_vae_state(path)
        assert (
            text in str(raised.value)
            and str(path) in str(raised.value)
            and "\n" not in str(raised.value)
        )
