"""A coherent reward changes the path's noise and not the initial one (AutoRefiner, section 3.3)."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autorefiner.refiner.cli import main
from autorefiner.refiner.demo import leverage
from autorefiner.refiner.demo.leverage import ChannelMean, LeverageOptions
from autorefiner.refiner.training.refiner_stage import RefinerStage

from tiny import TINY, tiny_network
from tiny_bundle import write_tiny_bundle

pytest.importorskip("peft")

OPTIONS = replace(LeverageOptions(24).training, height=4, width=4, precision="fp32")
PROMPTS = [f"prompt {number}" for number in range(64)]


def encode(prompts: list[str]) -> Tensor:
    generators = [torch.Generator().manual_seed(sum(map(ord, prompt))) for prompt in prompts]
    return torch.stack(
        [torch.randn(TINY.text_len, TINY.text_dim, generator=one) for one in generators]
    )


@pytest.mark.parametrize(
    ("method", "least", "most"), [("autorefiner", 0.5, 5.0), ("init-noise", 0.0, 0.1)]
)
def test_24_updates_raise_the_reward_by_the_paths_noises_alone(
    method: str, least: float, most: float
) -> None:
    options = replace(OPTIONS, method=method)
    stage = RefinerStage(
        options, tiny_network(), ChannelMean(), PROMPTS, encode, lambda *_: {}, ["held", "out"]
    )
    assert stage.compare() == {"held-out": 0.0}
    for index in range(options.steps):
        stage.step(index)
    assert least < stage.compare()["held-out"] < most


def test_the_command_writes_a_table(tmp_path: Path, monkeypatch, capsys) -> None:
    write_tiny_bundle(tmp_path)
    for name in ("load_sprite_network", "load_sprite_text"):
        monkeypatch.setattr(leverage, name, partial(getattr(leverage, name), folder=tmp_path))
    out = tmp_path / "RESULTS.md"
    assert main(["demo", "leverage", "--updates", "1", "--out", str(out), "--device", "cpu"]) == 0
    text = out.read_text()
    assert "## Leverage" in text
    for name in ("AutoRefiner", "InitNoiseRefiner", "LoRA"):
        assert f"| {name} " in text
    assert "after 1 updates of 4" in text
