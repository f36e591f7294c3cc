"""Load Reward and Score Video without ComfyUI, and training with the rewards they load."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from comfy_graphs import node, training
from standalone_runs import execute

from autorefiner.nodes import rewards
from autorefiner.nodes.hosts import standalone
from autorefiner.nodes.rewards import LoadReward, ScoreVideo
from autorefiner.refiner.demo import bundle
from autorefiner.refiner.training.options import RefineOptions
from autorefiner.refiner.training.refiner_stage import RefinerStage
from autorefiner.refiner.training.reward_objective import RewardObjective
from autorefiner.refiner.training.rewards.clip import load_clip_reward
from autorefiner.refiner.training.rewards.reward import Mixture

from tiny_reward import write_clip

SPRITES = {"kind": "sprites", "model": "bundled", "weight": 1.0, "frames": 0, "interval": 0}
PICK = {**SPRITES, "kind": "pick", "model": "tiny", "weight": 0.5}


@pytest.fixture
def base(base: Path) -> Iterator[Path]:
    """Run nodes at the ComfyUI-like folder."""
    with standalone.running_at(standalone.place_of(base, None, "cpu")):
        yield base


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    pytest.importorskip("transformers")
    return write_clip(tmp_path_factory.mktemp("clip"))


def video(frames: int = 33) -> torch.Tensor:
    """Return an IMAGE of random 8-bit values."""
    shape = (frames, 64, 64, 3)
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0)) / 255


def test_a_training_raises_what_was_loaded(base: Path, monkeypatch) -> None:
    pytest.importorskip("peft")
    moves: list[str] = []
    monkeypatch.setattr(rewards.Rewards, "_move", lambda self, device: moves.append(device.type))
    graph = training(
        objective="reward", reward=["5", 0], teacher=None, steps=2, width=64, height=64, l2=0.5
    )
    graph["5"] = node("AutoRefinerLoadReward", **SPRITES)
    refiner, losses, _ = execute(graph, base)["3"]
    options = RefineOptions(
        objective="reward", rank=2, steps=2, batch=2, accumulation=1, frames=6, height=8, width=8,
        learning_rate=1e-3, l2=0.5, precision="fp32",
    )  # fmt: skip
    student, text = (
        bundle.load_sprite_network("student", bundle.WEIGHTS),
        bundle.load_sprite_text(bundle.WEIGHTS),
    )
    mixture = Mixture(((bundle.load_sprite_reward(bundle.WEIGHTS), 1.0),))
    objective = RewardObjective(options, mixture, bundle.load_sprite_vae(bundle.WEIGHTS))
    prompts = graph["3"]["inputs"]["prompts"].splitlines()
    stage = RefinerStage(options, student, objective, prompts, text, lambda *_: {})
    assert losses == {"loss": [stage.step(index)["loss"] for index in range(2)]}
    assert all(
        torch.equal(refiner.pairs[name].up, pair.up) for name, pair in stage.average().items()
    )
    assert refiner.card.objective == "reward"
    assert moves == ["cpu", "cpu"]  # to the device, and back at the end


def test_a_score_is_the_weighted_sum_of_its_rewards(base: Path, clip: Path, capsys) -> None:
    (base / "models" / "rewards").mkdir(parents=True)
    (base / "models" / "rewards" / "tiny").symlink_to(clip)
    assert rewards.model_folders() == ["bundled", "tiny"]
    first = LoadReward.execute(**SPRITES).args[0]
    both = LoadReward.execute(**PICK, more=first).args[0]
    alone = [
        ScoreVideo.execute(video(), one, "a red star").args[0]
        for one in (first, LoadReward.execute(**PICK).args[0])
    ]
    assert ScoreVideo.execute(video(), both, "a red star").args[0] == pytest.approx(
        sum(alone), rel=1e-5
    )
    assert "(sprites " in capsys.readouterr().err
    mixture = Mixture(((load_clip_reward("pick", clip), 0.5),))
    drawn = mixture.newest(33, 33)
    seen = video()[list(drawn[0])].permute(0, 3, 1, 2)[None]
    expected = mixture(seen, drawn[0], drawn, ["a red star"])[0].item()
    assert alone[1] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="each once"):
        LoadReward.execute(**SPRITES, more=both)


@pytest.mark.parametrize(
    "change", [{"kind": "pick"}, {"model": "tiny"}, {"kind": "pick", "model": "../../secret"}]
)
def test_what_is_no_reward_is_said(change: dict, base: Path) -> None:
    with pytest.raises(ValueError) as error:
        LoadReward.execute(**{**SPRITES, **change})
    assert "\n" not in str(error.value)


def test_a_score_asks_for_room_for_its_models(base: Path, monkeypatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        standalone, "torch_device", lambda nbytes=0: asked.append(nbytes) or torch.device("cpu")
    )
    reward = LoadReward.execute(**SPRITES).args[0]
    ScoreVideo.execute(video(), reward, "a red star")
    assert asked == [reward.nbytes] and reward.nbytes > 0


def test_a_video_that_does_not_fit_in_memory_is_not_scored(base: Path, monkeypatch) -> None:
    monkeypatch.setattr("autorefiner.refiner.estimate.available_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="scoring"):
        ScoreVideo.execute(video(), LoadReward.execute(**SPRITES).args[0], "a red star")
