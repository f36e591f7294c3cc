"""Workflows without ComfyUI: their results, and the errors of wrong ones."""

import json
import os
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from comfy_graphs import NAMES, NEED_COMFYUI, NEED_PEFT, node, small
from demo_files import STAND_IN
from standalone_runs import execute, refusal

from autorefiner.nodes import workflow
from autorefiner.nodes.cli import main
from autorefiner.nodes.hosts import standalone
from autorefiner.nodes.load import LoadARVDM
from autorefiner.nodes.refiner import LoadRefiner
from autorefiner.nodes.registry import NODES
from autorefiner.refiner import estimate
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
    sizes = {
        "compare_controls": (128, 128),
        "quickstart": (64, 128),
        "train_a_refiner": (64, 128),
    }  # several videos in one
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
    nbytes = (
        2 * STAND_IN.num_layers * 3 * 16 * STAND_IN.dim * 4
    )  # a window longer than the clip's 3 frames is the clip
    assert f"6 latent frames, of them 1 sink: {nbytes / 1e6:,.1f} MB" in capsys.readouterr().err


def test_a_prompt_that_is_like_no_caption_is_told(base: Path, capsys) -> None:
    graph = small("text_to_video")
    graph["2"]["inputs"]["text"] = "a red dragon by a star on a blue ground"
    execute(graph, base)
    errors = capsys.readouterr().err
    assert "'dragon', 'by'" in errors
    assert "motion" in errors


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
        "inputs": {
            "images": ["4", 0],
            "filename_prefix": "w",
            "fps": 8.0,
            "lossless": True,
            "quality": 80,
            "method": "default",
        },
    }
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
    ("size", "box"),
    [((97, 80), (8, 89, 0, 80)), ((80, 97), (0, 80, 8, 89)), ((1, 999), (0, 1, 499, 500))],
)
def test_a_picture_is_cropped_about_its_centre_as_in_comfyui(size: tuple, box: tuple) -> None:
    width, height = size
    image = torch.arange(width * height * 3).reshape(1, height, width, 3).float()
    left, right, top, bottom = box
    side = {"width": 64, "height": 64}
    crop = workflow.CLASSES["ImageScale"].execute
    cropped = crop(image, "nearest-exact", **side, crop="center").args[0]
    assert torch.equal(
        cropped,
        crop(image[:, top:bottom, left:right], "nearest-exact", **side, crop="disabled").args[0],
    )


def test_a_workflow_of_other_nodes_needs_comfyui(base: Path) -> None:
    graph = small("sampler_custom_advanced")
    message = refusal(graph, base)
    assert "ModelSamplingSD3" in message and "needs ComfyUI" in message


SAMPLER = "node 3 (Pathwise Refined Sampler)"
WRONG = {
    "length": (
        {"3": {"length": 20}},
        f"{SAMPLER}: 20 frames: a clip has 1 + 4n pixel frames, the nearest are 17 and",
    ),
    "size": (
        {"3": {"width": 72}},
        f"{SAMPLER}: width 72, height 64: both must be multiples of 16, the nearest is 6",
    ),
    "most": (
        {"3": {"width": 99999}},
        f"{SAMPLER}, input width: 99999 is bigger than the most, 8192",
    ),
    "long": (
        {"3": {"length": 99997}},
        f"{SAMPLER}, input length: 99997 is bigger than the most, 16381",
    ),
    "method": ({"3": {"method": "self-forcin"}}, "'self-forcin' is not one of the"),
    "seed": ({"3": {"seed": -1}}, "input seed: -1 is smaller than the least, 0"),
    "type": ({"3": {"model": ["2", 0]}}, "CONDITIONING"),
    "lost": ({"3": {"model": ["12", 0]}}, "node 12"),
    "output": ({"3": {"model": ["1", 7]}}, "number 7"),
    "value": ({"3": {"model": "x"}}, "input model"),
    "circle": ({"2": {"clip": ["3", 0]}}, "the nodes go round in a circle"),
    "outside": ({"6": {"filename_prefix": "../../x"}}, "filename_prefix '../../x' leaves"),
    "absolute": ({"6": {"filename_prefix": "/tmp/x"}}, "filename_prefix '/tmp/x' leaves"),
    "folder": ({"6": {"filename_prefix": "."}}, "filename_prefix '.' leaves"),
    "back": ({"6": {"filename_prefix": "x/.."}}, "filename_prefix 'x/..' leaves"),
    "name": (
        {"6": {"filename_prefix": "x" * 300}},
        f"node 6 (Save Video): filename_prefix '{'x' * 60}…' cannot be",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_told_with_its_node_and_what_to_do(case: str, base: Path) -> None:
    graph = small("text_to_video")
    graph["3"]["inputs"]["length"] = 5
    changes, message = WRONG[case]
    for key, inputs in changes.items():
        graph[key]["inputs"] |= inputs
    assert message in refusal(graph, base)


def test_a_missing_input_is_told(base: Path) -> None:
    graph = small("text_to_video")
    del graph["3"]["inputs"]["positive"]
    assert "input positive" in refusal(graph, base)


def test_start_latents_that_do_not_fit_are_told(base: Path) -> None:
    graph = small("start_image")
    graph["6"]["inputs"]["width"] = 96
    assert "96x64" in refusal(graph, base)
    graph = small("extend_a_clip")
    graph["6"]["inputs"]["length"] = 69
    assert "18 latent frames" in refusal(graph, base)
    graph["4"]["inputs"]["length"], graph["6"]["inputs"]["length"] = 17, 69
    assert "5 latent frames" in refusal(graph, base)


def test_options_of_a_refiner_are_refused_without_one(base: Path) -> None:
    for name in ("history", "previous_x0"):
        graph = small("extend_a_clip")
        graph["3"]["inputs"][name] = "none"
        assert "REFLECTIVE_CACHE" in refusal(graph, base)


def test_own_windows_and_levels_that_do_not_fit_are_told(base: Path) -> None:
    graph = small("extend_a_clip")
    graph["3"]["inputs"] |= {"window": 5, "sink": 3}
    assert "window of 5" in refusal(graph, base)
    graph["3"]["inputs"] |= {"window": 2}
    assert "at least 4" in refusal(graph, base)
    schedule = {
        "preset": "the model's",
        "levels": "1000, 500",
        "frames_per_chunk": 1,
        "first_levels": "",
        "refined_levels": "",
    }
    graph = small("text_to_video")
    graph["3"]["inputs"] |= {"chunk_schedule": ["9", 0], "length": 9}
    graph["9"] = {"class_type": "AutoRefinerChunkSchedule", "inputs": schedule}
    assert execute(graph, base)["3"][0]["samples"].shape[2] == 3
    for change, message in (
        ({"levels": "500, 1000"}, "levels 500,1000"),
        ({"levels": "900, 500"}, "begin with 1000"),
        ({"first_levels": "a"}, "first_levels 'a'"),
        ({"refined_levels": "500"}, "refined_levels"),
    ):
        graph["9"]["inputs"] = schedule | change
        assert message in refusal(graph, base)


def test_untrusted_files_are_refused(base: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (base / "owned",))

    torch.save({"generator": Evil()}, base / "models" / "diffusion_models" / "evil.pt")
    graph = small("self_forcing")
    graph["1"]["inputs"]["file"] = "evil.pt"
    assert "could run code" in refusal(graph, base)
    assert not (base / "owned").exists()
    (base / "secret.safetensors").touch()
    graph["1"]["inputs"]["file"] = "../../secret.safetensors"
    assert "not one of" in refusal(graph, base)
    graph = small("start_image")
    for name in ("../graph.json", "/etc/hostname", "", "a\0b"):
        graph["5"]["inputs"]["image"] = name
        assert "leaves" in refusal(graph, base)
    (base / "input" / "text.png").write_text("no picture")
    graph["5"]["inputs"]["image"] = "text.png"
    assert "picture" in refusal(graph, base)


def test_all_that_is_wrong_is_told_at_once(base: Path) -> None:
    graph = small("self_forcing")
    for each in graph.values():
        each["inputs"] |= {
            name: "gone.safetensors"
            for name in ("file", "vae_name", "clip_name")
            if name in each["inputs"]
        }
    message = refusal(graph, base)
    assert (
        message.count("'gone.safetensors' is not one of the") >= 2 and "\n" not in message.strip()
    )


def test_what_a_workflow_calls_its_nodes_stays_one_plain_line(base: Path) -> None:
    graph = small("text_to_video")
    graph["3"]["_meta"]["title"] = "Sampler\n\x1b[2J" + "x" * 1000
    graph["3"]["inputs"] |= {"length": 5, "positive": ["gone\n\x1b[2J", 0]}
    message = refusal(graph, base)
    assert "node 3 (Sampler  [2Jx" in message and "gone  [2J" in message and len(message) < 300
    graph["3"]["class_type"] = "Other\n\x1b[2J"
    assert "Other  [2J" in refusal(graph, base)


def test_files_that_are_no_workflow_are_told(base: Path, capsys) -> None:
    path = base / "graph.json"
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "API format"),
        ('{"nodes": [], "links": []}', "of the page"),
        ('{"1": {"class_type": "AutoRefinerLoadDemo", "inputs": {}}}', "saves"),
        ('\ufeff{"1": {"class_type": "AutoRefinerLoadDemo", "inputs": {}}}', "saves"),
    ):
        path.write_text(text, encoding="utf-8")
        assert main(["run", str(path), "--base", str(base)]) == 2
        assert message in capsys.readouterr().err
    assert main(["run", str(base / "none.json")]) == 2
    assert main(["run", str(path), "--base", str(base / "none")]) == 2
    path.write_text(json.dumps(small("text_to_video")))
    capsys.readouterr()
    assert main(["run", str(path), "--base", str(base), "--out", str(path / "videos")]) == 2
    assert "videos" in capsys.readouterr().err


def test_a_file_that_does_not_say_its_preset_is_told_how(base: Path) -> None:
    weights = base / "models" / "diffusion_models"
    network = bundle.load_sprite_network("student", bundle.WEIGHTS).model
    torch.save(
        {"generator": {"model." + name: tensor for name, tensor in network.state_dict().items()}},
        weights / "model.pt",
    )
    graph = small("self_forcing")
    graph["1"]["inputs"]["file"] = "model.pt"
    assert "model.pt" in refusal(graph, base)
    graph["1"]["inputs"] |= {"file": "self_forcing_dmd.pt", "preset": "krea"}
    assert "'krea-14b'" in refusal(graph, base)


def test_every_input_of_every_node_has_a_tooltip_and_every_execute_is_short() -> None:
    import inspect

    for kind in NODES:
        schema = kind.define_schema()
        assert schema.description and schema.category == "AutoRefiner"
        assert all(socket.tooltip for socket in schema.inputs)
        assert len(inspect.getsource(kind.execute).splitlines()) <= 40


def test_what_is_linked_is_not_looked_at_before_it_is_known() -> None:
    """ComfyUI checks a prompt with None in the place of every link, in a tuple where a node takes
    lists."""
    import inspect

    for kind in NODES:
        if (validate := getattr(kind, "validate_inputs", None)) is not None:
            link = (None,) if kind.define_schema().is_input_list else None
            result = validate(**dict.fromkeys(inspect.signature(validate).parameters, link))
            assert result is True, f"{kind.__name__}: {result}"
    one, other = (
        LoadRefiner.fingerprint_inputs(file=None, model=None, strength=by, form="auto")
        for by in (1.0, 0.5)
    )
    assert (
        one
        == LoadRefiner.fingerprint_inputs(file=None, model=None, strength=1.0, form="auto")
        != other
    )


def test_a_model_that_took_the_place_of_another_is_read_again(tmp_path, monkeypatch) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"one")
    monkeypatch.setattr(standalone, "find_file", lambda folder, name: path)
    inputs = {"file": "model.pt", "preset": "auto", "dtype": "auto", "weights": "auto"}
    first = LoadARVDM.fingerprint_inputs(**inputs)
    assert LoadARVDM.fingerprint_inputs(**inputs) == first
    assert LoadARVDM.fingerprint_inputs(**inputs | {"weights": "raw"}) != first
    os.utime(path, (1, 1))
    assert LoadARVDM.fingerprint_inputs(**inputs) != first
    assert LoadARVDM.fingerprint_inputs(**inputs | {"file": None}) != first


def test_clips_larger_than_memory_are_refused_before_anything_is_made(
    base: Path, monkeypatch
) -> None:
    graph = small("text_to_video")
    graph["3"]["inputs"] |= {"width": 8192, "height": 8192, "length": 16381, "batch_size": 64}
    graph["3"]["inputs"]["reflective_cache"] = ["9", 0]
    options = {"positions": "the model's", "history": "as trained", "previous_x0": "as trained"}
    graph["9"] = {
        "class_type": "AutoRefinerReflectiveCache",
        "inputs": {"window": 3, "sink": 0, **options},
    }
    assert "17592.2 GB" in refusal(graph, base)
    graph["3"]["inputs"] |= {"length": 81, "batch_size": 1}
    del graph["3"]["inputs"]["reflective_cache"]
    monkeypatch.setattr(standalone, "available_bytes", lambda device: 10**9)
    assert "keys and values" in refusal(graph, base)
    graph = small("text_to_video")
    graph["3"]["inputs"]["length"] = 5
    monkeypatch.setattr(estimate, "available_bytes", lambda device: 1000)
    assert "VAE Decode Chunks to Video" in refusal(graph, base)
