"""Workflows run without ComfyUI: latents, videos, pictures, and progress on the terminal."""

import json
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from comfy_graphs import NAMES, NEED_COMFYUI, NEED_PEFT, node, small
from demo_files import STAND_IN
from standalone_runs import execute

from autorefiner.nodes import workflow
from autorefiner.nodes.cli import main
from autorefiner.nodes.hosts import standalone
from autorefiner.refiner.demo import bundle
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.video import video_rate

from decoding import decoded


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NEED_COMFYUI])
def test_every_workflow_of_the_pack_writes_its_video(name: str, base: Path, capsys) -> None:
    graph = small(name)
    sampler = [node for node in graph.values() if node["class_type"] == "AutoRefinerSampler"][-1]
    (base / "graph.json").write_text(json.dumps(graph))
    if name in NEED_PEFT:
        pytest.importorskip("peft")
    assert (
        main(["run", str(base / "graph.json"), "--base", str(base), "--out", str(base / "out")])
        == 0
    )
    path = base / "out" / "video" / f"{name}_00001_.mp4"
    assert str(path) in capsys.readouterr().out.splitlines()
    assert len(decoded(path)) == sampler["inputs"]["length"]
    # Several videos side by side.
    sizes = {"compare_controls": (64, 192), "quickstart": (64, 128), "train_a_refiner": (64, 128)}
    assert decoded(path).shape[1:] == (*sizes.get(name, (64, 64)), 3)


def test_a_workflow_samples_what_the_core_does(base: Path) -> None:
    graph = small("text_to_video")
    graph["3"]["inputs"] |= {"length": 21, "seed": 5}
    raw = execute(graph, base)["3"][0]["samples"]
    network = bundle.load_sprite_network("student", bundle.WEIGHTS)
    context = bundle.load_sprite_text(bundle.WEIGHTS)([graph["2"]["inputs"]["text"]])
    plan = RunPlan(PRESETS["self-forcing"], 6, 8, 8)
    expected = torch.cat(list(sample(network, context, plan, seed=5)), 2)
    assert torch.equal(raw, standalone.raw_latents(expected))


def test_a_clip_that_goes_on_equals_the_long_one(base: Path) -> None:
    graph = small("extend_a_clip")
    extended = execute(graph, base)["6"][0]["samples"]
    del graph["6"]["inputs"]["start"]
    whole = execute(graph, base)["6"][0]["samples"]
    torch.testing.assert_close(extended, whole, atol=1e-4, rtol=1e-4)


def test_a_batch_holds_the_video_of_its_seed_first(base: Path) -> None:
    graph = small("text_to_video")
    graph["3"]["inputs"] |= {"length": 9}
    one = execute(graph, base)["3"][0]["samples"]
    graph["3"]["inputs"]["batch_size"] = 2
    results = execute(graph, base)
    two, images = results["3"][0]["samples"], results["4"][0]
    torch.testing.assert_close(two[:1], one, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(two[:1], two[1:]) and len(images) == 18


def test_decoding_in_chunks_equals_decoding_at_once(base: Path) -> None:
    graph = small("text_to_video")
    graph["3"]["inputs"] |= {"length": 25}
    results = execute(graph, base)
    vae, raw = results["1"][2], results["3"][0]["samples"]
    whole = vae.decode(standalone.normalized(raw))[0].permute(1, 2, 3, 0)
    torch.testing.assert_close(results["4"][0], ((whole + 1) / 2).clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_a_streaming_decoder_takes_chunks_of_any_length() -> None:
    vae = bundle.load_sprite_vae(bundle.WEIGHTS)
    raw = torch.randn(1, 16, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = torch.cat(list(standalone.decode(vae, raw)))
    decode_next = standalone.stream_decoder(vae)
    frames = [decode_next(piece) for piece in raw.split((1, 1, 3), dim=2)]
    assert [len(piece) for piece in frames] == [1, 4, 12]
    torch.testing.assert_close(torch.cat(frames), whole, atol=1e-5, rtol=1e-5)


def test_a_clip_far_larger_than_the_model_was_made_for_is_mentioned(base: Path, capsys) -> None:
    graph = small("text_to_video")
    noted = []
    for side in (112, 128):
        graph["3"]["inputs"] |= {"width": side, "height": side, "length": 1}
        execute(graph, base)
        noted.append("made for 64x64" in capsys.readouterr().err)
    assert noted == [False, True]


def test_an_empty_latent_gives_the_size_instead_of_the_widgets(base: Path) -> None:
    graph = small("extend_a_clip")
    graph["6"]["inputs"] |= {"latent": ["4", 0], "width": 96, "length": 5}
    del graph["6"]["inputs"]["start"]
    assert execute(graph, base)["6"][0]["samples"].shape == (1, 16, 18, 8, 8)


def test_reflective_cache_tells_its_bytes(base: Path, capsys) -> None:
    graph = small("self_forcing")
    graph["5"]["inputs"] |= {"window": 6, "sink": 1, "model": ["1", 0], "latent": ["8", 0]}
    graph["8"] = graph["6"] | {"inputs": {**graph["6"]["inputs"], "length": 9}}
    del graph["8"]["inputs"]["reflective_cache"]
    graph["6"]["inputs"]["length"] = 9
    execute(graph, base)
    # The clip has 3 frames, fewer than the window.
    nbytes = 2 * STAND_IN.num_layers * 3 * 16 * STAND_IN.dim * 4
    assert f"6 latent frames, of them 1 sink: {nbytes / 1e6:,.1f} MB" in capsys.readouterr().err


def test_a_prompt_that_is_like_no_caption_is_told(base: Path, capsys) -> None:
    graph = small("text_to_video")
    graph["2"]["inputs"]["text"] = "a red dragon by a star on a blue ground"
    execute(graph, base)
    message = capsys.readouterr().err
    assert "'dragon', 'by'" in message
    assert "motion" in message


def test_values_are_set_by_id_and_by_title(base: Path, capsys) -> None:
    (base / "graph.json").write_text(json.dumps(small("text_to_video")))
    values = [
        "--set",
        "3.length=5",
        "--set",
        "Save Video.filename_prefix=a/b",
        "--set",
        "Create Video.fps=8",
    ]
    assert main(["run", str(base / "graph.json"), "--base", str(base), *values]) == 0
    assert len(decoded(base / "output" / "a" / "b_00001_.mp4")) == 5
    for wrong, message in (
        ("3.lenght=5", "'lenght'"),
        ("9.length=5", "1 (Load AR-VDM Demo)"),
        ("length", "give node.input=value"),
        ("3.length=many", "input length: 'many'"),
    ):
        assert main(["run", str(base / "graph.json"), "--base", str(base), "--set", wrong]) == 2
        assert message in capsys.readouterr().err


def test_images_and_webp_are_written(base: Path) -> None:
    graph = small("text_to_video")
    graph["3"]["inputs"]["length"] = 5
    graph["6"] = {
        "class_type": "SaveAnimatedWEBP",
        "inputs": {"images": ["4", 0], "filename_prefix": "w", "fps": 8.0, "lossless": True,
                   "quality": 80, "method": "default"},
    }  # fmt: skip
    graph["7"] = {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "i"}}
    execute(graph, base)
    assert (base / "output" / "w_00001_.webp").read_bytes()[:4] == b"RIFF"
    assert len(list((base / "output").glob("i_*_.png"))) == 5


def test_a_decoded_video_keeps_its_rate(base: Path) -> None:
    graph = small("text_to_video")
    graph["3"]["inputs"]["length"] = 5
    graph["4"] = node(
        "AutoRefinerDecodeToVideo", samples=["3", 0], vae=["1", 2], fps=8, filename_prefix="first"
    )
    del graph["5"]
    graph["6"] = node(
        "SaveVideo", video=["4", 0], filename_prefix="second", format="auto", codec="auto"
    )
    execute(graph, base)
    files = [base / "output" / f"{name}_00001_.mp4" for name in ("first", "second")]
    assert [video_rate(path) for path in files] == [8, 8]
    assert [len(decoded(path)) for path in files] == [5, 5]


@pytest.mark.parametrize("fps", ["23.976", "12.5", "29.97", "1.4"])
def test_a_rate_that_is_no_whole_number_is_kept(base: Path, fps: str) -> None:
    graph = small("text_to_video")
    graph["3"]["inputs"]["length"] = 5
    (base / "graph.json").write_text(json.dumps(graph))
    assert (
        main(
            [
                "run",
                str(base / "graph.json"),
                "--base",
                str(base),
                "--set",
                f"Create Video.fps={fps}",
            ]
        )
        == 0
    )
    path = base / "output" / "video" / "text_to_video_00001_.mp4"
    assert video_rate(path) == Fraction(fps)
    assert len(decoded(path)) == 5


@pytest.mark.parametrize("saver", ["SaveVideo", "AutoRefinerDecodeToVideo"])
def test_a_video_holds_the_workflow_that_made_it(base: Path, saver: str) -> None:
    graph = small("text_to_video")
    graph["3"]["inputs"]["length"] = 5
    if saver == "AutoRefinerDecodeToVideo":
        graph["4"] = node(
            saver, samples=["3", 0], vae=["1", 2], fps=8, filename_prefix="video/text_to_video"
        )
        del graph["5"], graph["6"]
    (base / "graph.json").write_text(json.dumps(graph))
    assert main(["run", str(base / "graph.json"), "--base", str(base), "--set", "3.seed=9"]) == 0
    with av.open(str(base / "output" / "video" / "text_to_video_00001_.mp4")) as container:
        prompt = json.loads(container.metadata["prompt"])
    assert prompt["3"]["inputs"]["seed"] == "9"
    (base / "again.json").write_text(json.dumps(prompt))
    assert main(["run", str(base / "again.json"), "--base", str(base)]) == 0


def test_pixels_that_are_not_finite_are_no_black_video(base: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        standalone, "decode", lambda vae, raw: iter([torch.full((1, 64, 64, 3), float("nan"))])
    )
    for kind in ("AutoRefinerDecodeToVideo", "AutoRefinerDecodeChunks"):
        graph = small("text_to_video")
        graph["3"]["inputs"]["length"] = 5
        graph["4"] = node(kind, samples=["3", 0], vae=["1", 2], fps=8, filename_prefix="nan")
        if kind == "AutoRefinerDecodeToVideo":
            del graph["5"], graph["6"]
        with pytest.raises(ValueError, match="NaN"):
            execute(graph, base)
    assert not list((base / "output").glob("**/*.mp4"))


def test_what_an_interrupted_run_left_stays(base: Path) -> None:
    graph = small("text_to_video")
    graph["3"]["inputs"]["length"] = 5
    left = base / "output" / "video" / "text_to_video_00001_.partial.mp4"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"what is finished")
    execute(graph, base)
    assert left.read_bytes() == b"what is finished"
    assert len(decoded(left.with_name("text_to_video_00002_.mp4"))) == 5


@pytest.mark.parametrize(
    ("size", "kept"),
    [((97, 80), (8, 89, 0, 80)), ((80, 97), (0, 80, 8, 89)), ((1, 999), (0, 1, 499, 500))],
)
def test_a_picture_is_cropped_about_its_centre_as_in_comfyui(size: tuple, kept: tuple) -> None:
    width, height = size
    image = torch.arange(width * height * 3).reshape(1, height, width, 3).float()
    left, right, top, bottom = kept
    side = {"width": 64, "height": 64}
    crop = workflow.CLASSES["ImageScale"].execute
    found = crop(image, "nearest-exact", **side, crop="center").args[0]
    assert torch.equal(
        found,
        crop(image[:, top:bottom, left:right], "nearest-exact", **side, crop="disabled").args[0],
    )
