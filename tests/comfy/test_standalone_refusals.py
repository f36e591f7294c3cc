"""Wrong workflows without ComfyUI: one line that names the node and says what to do."""

import json
from pathlib import Path

import pytest
import torch
from comfy_graphs import small
from standalone_runs import execute, refusal

from autorefiner.nodes.cli import main
from autorefiner.nodes.hosts import standalone
from autorefiner.refiner import estimate
from autorefiner.refiner.demo import bundle


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
