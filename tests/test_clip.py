"""CLIP rewards from a local folder: formulas, ranges, preprocessing and refused folders."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from autorefiner.refiner.training.rewards.clip import FORMULAS, Preprocessing, load_clip_reward
from autorefiner.refiner.training.rewards.reward import FrameDraw, scored

from tiny_reward import write_clip

transformers = pytest.importorskip("transformers")

PROMPTS = ["a red star", "a blue ring"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def frames() -> torch.Tensor:
    return torch.rand(2, 3, 3, 20, 28, generator=torch.Generator().manual_seed(1))


def test_formulas_of_the_cosine_and_their_ranges(folder, frames) -> None:
    rewards = {name: load_clip_reward(name, folder) for name in FORMULAS}
    scale = math.exp(rewards["pick"].model.logit_scale.item())
    found = {name: scored(reward, frames, [0, 1, 2], PROMPTS) for name, reward in rewards.items()}
    cosine = found["hps"]
    assert cosine.abs().max() <= 1
    assert not torch.allclose(cosine[0], cosine[1])
    assert torch.allclose(found["pick"], scale * cosine, rtol=1e-5)
    each = torch.stack(
        [scored(rewards["hps"], frames[:, i : i + 1], [i], PROMPTS) for i in range(3)]
    )
    assert torch.allclose(each.mean(0), cosine, atol=1e-6)
    assert torch.allclose(found["clip"], 2.5 * each.clamp_min(0).mean(0), atol=1e-6)
    ranges = {name: reward.range for name, reward in rewards.items()}
    assert ranges == {
        "clip": (0.0, 2.5),
        "pick": (pytest.approx(-scale), pytest.approx(scale)),
        "hps": (-1.0, 1.0),
    }


def test_the_cosine_is_the_models_own(folder, frames) -> None:
    reward = load_clip_reward("hps", folder, frames=FrameDraw(1))
    assert reward.frames == FrameDraw(1)
    tokens = reward.tokenizer(
        PROMPTS, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = reward.model(pixel_values=reward.preprocess(frames[:, 0]), **tokens)
    expected = out.logits_per_image.diag() / reward.scale
    assert torch.allclose(scored(reward, frames[:, :1], [0], PROMPTS), expected, atol=1e-6)


def test_pictures_keep_their_graph_and_the_model_gets_none(folder, frames) -> None:
    reward = load_clip_reward("pick", folder)
    frames.requires_grad_(True)
    scored(reward, frames, [0, 1, 2], PROMPTS).sum().backward()
    inside = frames.grad[..., 4:-4].abs()  # the cut takes 3 pixels from each side
    assert (inside > 0).float().mean() > 0.9
    assert all(parameter.grad is None for parameter in reward.model.parameters())


@pytest.mark.parametrize("size", [(20, 28), (40, 24), (16, 16), (64, 64)])
def test_pictures_go_in_as_transformers_sends_them(folder, size) -> None:
    # No overshoot for PIL to clip.
    coarse = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    pictures = (40 + 160 * smooth).byte().permute(0, 2, 3, 1).numpy()
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    expected = kind.from_pretrained(folder)(images=list(pictures), return_tensors="pt")[
        "pixel_values"
    ]
    found = Preprocessing.read(folder)(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255)
    assert found.shape == expected.shape
    # PIL rounds to 8 bits.
    assert (found - torch.as_tensor(np.asarray(expected))).abs().max() < 1.1 / 255 / 0.26


def test_older_and_newer_ways_to_write_sizes(tmp_path) -> None:
    stated = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def read(**changes) -> Preprocessing:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated | changes))
        return Preprocessing.read(tmp_path)

    image = torch.rand(1, 3, 24, 30)
    assert read(size=16, crop_size=12)(image).shape == (1, 3, 12, 12)
    assert read(size={"height": 10, "width": 20}, do_center_crop=False)(image).shape == (
        1,
        3,
        10,
        20,
    )
    kept = read(do_resize=False, crop_size={"height": 24, "width": 30})
    assert torch.equal(kept(image), (image - 0.5) / 0.5)
    with pytest.raises(ValueError, match="crop"):
        read(do_resize=False, crop_size=32)(image)
    for wrong in (
        {"size": 16},
        {"size": {"longest": 16}, "crop_size": 16},
        {"size": 16, "crop_size": 16, "resample": 9},
    ):
        with pytest.raises(ValueError, match="pictures"):
            read(**wrong)


def test_what_is_no_clip_in_safetensors_is_refused_in_one_line(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no model"):
        load_clip_reward("clip", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="bert"):
        load_clip_reward("clip", tmp_path)
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(
        transformers.CLIPModel.from_pretrained(folder).state_dict(), tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(ValueError, match=r"^[^\n]*CLIP[^\n]*$"):
        load_clip_reward("clip", tmp_path)
