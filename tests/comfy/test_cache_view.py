"""The page's preview of a Reflective Cache: bytes of a run, and one-line errors."""

import json
from pathlib import Path

import pytest
import torch
from comfy_graphs import of_kind, small
from comfy_server import Refused, Server, find_comfyui
from demo_files import STAND_IN, use_demo_files, write_base, write_demo_files

from autorefiner.nodes.cache import ReflectiveCacheNode
from autorefiner.nodes.cache_view import cache_view
from autorefiner.nodes.hosts import standalone
from autorefiner.refiner.memory.ring import RingMemory
from autorefiner.refiner.sample import RunPlan
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.wan.causal import CausalWan

SIZE = {"width": 64, "height": 64, "length": 81, "batch_size": 1}
ASKED = {
    "window": -1, "sink": 0, "positions": "the model's", "history": "as trained",
    "previous_x0": "as trained", "memory": "the model's", "memory_settings": "",
    "positions_settings": "", "store": "plain",
    "model": {"demo": True}, "size": SIZE, "refiner": None, "schedule": None,
}  # fmt: skip
FILE = {"file": "self_forcing_dmd.pt", "preset": "auto", "dtype": "auto", "weights": "auto"}
SCHEDULE = {
    "preset": "longlive",
    "levels": "",
    "frames_per_chunk": 0,
    "first_levels": "",
    "refined_levels": "",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return write_demo_files(tmp_path_factory.mktemp("weights"))


@pytest.fixture(autouse=True)
def place(files: Path, tmp_path: Path, monkeypatch) -> None:
    """Point the standalone host at a ComfyUI-like folder; the bundle is a stand-in."""
    use_demo_files(files, monkeypatch)
    write_base(tmp_path, files)
    (tmp_path / "secret.safetensors").write_bytes(b"")
    with standalone.running_at(standalone.place_of(tmp_path, None, "cpu")):
        yield


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize(("window", "sink"), [(-1, 0), (9, 3)])
def test_it_tells_the_bytes_that_a_run_allocates(window: int, sink: int, refined: bool) -> None:
    refiner = {"file": "sprites"} if refined else None
    view = cache_view({**ASKED, "window": window, "sink": sink, "refiner": refiner})
    plan = RunPlan(PRESETS["self-forcing"].changed(window=window, sink=sink), 21, 8, 8)
    network = CausalWan(torch.nn.Module(), STAND_IN)
    assert view["bytes"] == RingMemory(plan.memory(network.config, torch.float32, refined)).nbytes
    assert (view.get("history"), view.get("previous")) == (
        ("shared", "pending") if refined else (None, None)
    )


def test_the_node_itself_says_the_same_bytes() -> None:
    model = standalone.load_demo("student")[0]
    latent = {"samples": torch.zeros(1, 16, 21, 8, 8)}
    shown = ReflectiveCacheNode.execute(
        9, 3, "the model's", "as trained", "as trained", model, latent
    ).ui
    assert f"{cache_view({**ASKED, 'window': 9, 'sink': 3})['bytes'] / 1e6:,.1f} MB" in shown


NAMES = ["the model's", "absolute", "relative", "sink-adjacent", "flex", "relative to the window"]


@pytest.mark.parametrize("positions", NAMES)
def test_positions_keep_the_names_of_older_workflows(positions: str) -> None:
    (cache,) = ReflectiveCacheNode.execute(9, 3, positions, "as trained", "as trained").args
    former = {"relative to the window": "relative", "the model's": "absolute"}
    assert cache.applied(PRESETS["self-forcing"]).positions == former.get(positions, positions)
    assert ReflectiveCacheNode.validate_inputs(positions) is True
    assert cache_view({**ASKED, "window": 9, "sink": 3, "positions": positions})["sink"] == 3


def test_it_draws_what_the_last_chunk_sees() -> None:
    view = cache_view({**ASKED, "window": 9, "sink": 3})
    assert (view["chunks"], view["start"], view["end"]) == (7, 18, 21)
    assert view["sees"] == [0, 1, 2, 15, 16, 17]
    assert cache_view(ASKED)["sees"] == list(range(18))


def test_a_file_and_a_schedule_are_looked_into() -> None:
    view = cache_view({**ASKED, "model": FILE, "schedule": SCHEDULE})
    assert (view["chunks"], view["dtype"]) == (7, "float32")
    half = cache_view({**ASKED, "model": {**FILE, "dtype": "bf16"}})
    assert (half["dtype"], 2 * half["bytes"]) == ("bfloat16", view["bytes"])
    one = cache_view({**ASKED, "schedule": {**SCHEDULE, "frames_per_chunk": 1}})
    assert one["chunks"] == 21


@pytest.mark.parametrize("part", ["model", "size"])
def test_what_the_page_does_not_know_is_said_to_be_missing(part: str) -> None:
    assert cache_view({**ASKED, part: None}) == {"missing": part}


@pytest.mark.comfyui
@pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")
@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp8_e4m3fn"])
def test_a_real_server_tells_what_the_run_then_tells(dtype: str, server: Server) -> None:
    graph = small("self_forcing")
    graph[of_kind(graph, "AutoRefinerLoadARVDM")]["inputs"]["dtype"] = dtype
    sampler, cache = (
        of_kind(graph, f"AutoRefiner{kind}") for kind in ("Sampler", "ReflectiveCache")
    )
    graph[sampler]["inputs"]["length"] = 81
    graph[cache]["inputs"] |= {"window": 9, "sink": 3}
    asked = {**ASKED, "window": 9, "sink": 3, "model": {**FILE, "dtype": dtype}}
    nbytes = server.post("/autorefiner/cache", asked)["bytes"]
    shown = server.run(graph)["outputs"][sampler]["text"][0]
    assert f"{nbytes / 1e6:,.1f} MB of keys and values" in shown
    with pytest.raises(Refused) as refused:
        server.post("/autorefiner/cache", {**asked, "window": 2})
    assert "window" in refused.value.answer["error"]


@pytest.mark.parametrize(
    "odd",
    [
        None, [], "text", {}, {**ASKED, "window": "9"}, {**ASKED, "window": 2, "sink": 3},
        {**ASKED, "window": 10**9}, {**ASKED, "positions": "elsewhere"}, {**ASKED, "model": []},
        {**ASKED, "size": {**SIZE, "length": 80}}, {**ASKED, "size": {**SIZE, "length": 10**6 + 1}},
        {**ASKED, "size": {**SIZE, "width": 1 << 14}},
        {**ASKED, "model": {**FILE, "file": "../../secret.safetensors"}},
        {**ASKED, "model": {**FILE, "file": ["x"]}}, {**ASKED, "model": {**FILE, "dtype": "int4"}},
        {**ASKED, "refiner": {"file": "../../secret.safetensors"}}, {**ASKED, "refiner": 7},
        {**ASKED, "schedule": {"preset": "no such"}},
        {**ASKED, "schedule": {**SCHEDULE, "levels": "high"}}, {**ASKED, "history": "none"},
        {**ASKED, "memory": "no-such"}, {**ASKED, "memory_settings": "k=4"},
        {**ASKED, "memory": None}, {**ASKED, "store": "disk"},
        {**ASKED, "positions": "flex", "positions_settings": "scale=0"},
    ],
    ids=lambda odd: json.dumps(odd)[-50:],
)  # fmt: skip
def test_what_is_odd_is_an_error_of_one_line(odd: object) -> None:
    with pytest.raises(ValueError) as raised:
        cache_view(odd)
    assert "\n" not in str(raised.value)


def test_positions_that_are_not_known_are_one_line() -> None:
    assert "sink-adjacent" in ReflectiveCacheNode.validate_inputs("elsewhere")
    assert ReflectiveCacheNode.validate_inputs() is True
