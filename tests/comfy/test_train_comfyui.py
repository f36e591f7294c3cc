"""Train Refiner LoRA in a real ComfyUI: equal to without it, plotted, interrupted and resumed."""

import json
import subprocess
import time
from pathlib import Path

import pytest
from comfy_graphs import node, training
from comfy_server import Refused, Server, find_comfyui
from demo_files import use_demo_files
from safetensors.torch import load_file

from autorefiner.nodes import workflow
from autorefiner.nodes.hosts import standalone
from autorefiner.refiner.demo import bundle
from autorefiner.refiner.noise.file import load_refiner

pytestmark = [pytest.mark.comfyui, pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")]


def rows(folder: Path) -> list[dict]:
    """Return the complete lines of a run's log."""
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.mark.usefixtures("peft_inside")
def test_it_trains_what_it_does_without_comfyui_and_its_losses_are_plotted(
    server: Server, weights: Path, monkeypatch, tmp_path: Path
) -> None:
    graph = training(run="plotted")
    graph["5"] = node("LossGraphNode", loss=["3", 1], filename_prefix="loss")
    outputs = server.run(graph)["outputs"]
    sheet = outputs["3"]["autorefiner_sheet"][0]
    assert outputs["3"]["text"][0].splitlines()[-1] == "4 steps in plotted"
    assert outputs["5"]["images"]
    run = server.base / "output" / sheet["subfolder"]
    assert (
        run == server.base / "output" / "autorefiner" / "plotted"
        and (run / sheet["filename"]).is_file()
    )
    use_demo_files(weights, monkeypatch)
    (tmp_path / "graph.json").write_text(json.dumps(training(run="plotted")))
    with standalone.running_at(standalone.place_of(tmp_path, None, "cpu")):
        alone = workflow.execute(workflow.read_workflow(tmp_path / "graph.json"))["3"].args
    made = [row["loss"] for row in rows(run)]
    assert made == pytest.approx(alone[1]["loss"], rel=1e-3)
    pairs, card = load_refiner(server.base / "models" / "loras" / "mine.refiner.safetensors")
    assert card == alone[0].card
    assert any(pair.up.abs().sum() > 0 for pair in pairs.values())


@pytest.mark.usefixtures("peft_inside")
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(server: Server) -> None:
    run = server.base / "output" / "autorefiner" / "stopped"
    steps = 120  # long enough to be interrupted; the learning rate depends on the number of steps
    prompt = server.queue(training(run="stopped", steps=steps, vae=None))
    end = time.monotonic() + 600
    while len(rows(run)) < 3 and not server.get(f"/history/{prompt}") and time.monotonic() < end:
        time.sleep(0.1)
    server.post("/interrupt", {})
    ended = server.wait(prompt)
    assert "execution_interrupted" in [event for event, _ in ended["status"]["messages"]]
    assert len(rows(run)) < steps
    server.run(training(run="stopped", steps=steps, vae=None))
    server.run(training(run="through", steps=steps, vae=None))
    losses = [[row["loss"] for row in rows(folder)] for folder in (run, run.with_name("through"))]
    assert len(losses[0]) == steps and losses[0] == losses[1]


@pytest.mark.usefixtures("peft_inside")
def test_a_refined_sampler_takes_what_was_trained(server: Server) -> None:
    graph = training(run="used", steps=2, vae=None)
    del graph["4"]
    graph["5"] = node("CLIPTextEncode", text="a red star", clip=["1", 1])
    sampler = {
        "width": 64,
        "height": 64,
        "length": 21,
        "batch_size": 1,
        "seed": 0,
        "method": "self-forcing",
    }
    graph["6"] = node(
        "AutoRefinerSampler", model=["1", 0], positive=["5", 0], refiner=["3", 0], **sampler
    )
    graph["7"] = node("AutoRefinerSampler", model=["1", 0], positive=["5", 0], **sampler)
    for key in ("6", "7"):
        graph[f"9{key}"] = node("SaveLatent", samples=[key, 0], filename_prefix=f"trained/{key}")
    server.run(graph)
    folder = server.base / "output" / "trained"
    made, base = (
        load_file(sorted(folder.glob(f"{key}_*"))[-1])["latent_tensor"] for key in ("6", "7")
    )
    assert 0 < (made - base).abs().max() < 1


@pytest.mark.parametrize("run", ["../elsewhere", "/tmp/elsewhere", "a/../../b"])
def test_a_run_stays_in_the_output_folder(run: str, server: Server) -> None:
    with pytest.raises(Refused) as refused:
        server.queue(training(run=run))
    assert "foxes" in json.dumps(refused.value.answer)


def test_a_training_takes_copies_of_the_weights_with_their_loras(
    server: Server, weights: Path
) -> None:
    comfyui, python = find_comfyui()
    pack = server.base / "custom_nodes" / "autorefiner"
    script = Path(__file__).with_name("inside_training.py")
    command = [
        str(python),
        str(script),
        str(comfyui),
        str(pack),
        str(weights / bundle.FILES["student"]),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    report = json.loads(ended.stdout.splitlines()[-1])
    assert report.pop("lora") < 1e-5
    assert all(report.values()), report
