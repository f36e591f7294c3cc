"""Pictures of latents in ComfyUI: by the tiny decoder, in the strip and in ComfyUI's previews."""

import json
import subprocess
from pathlib import Path

import pytest
from comfy_server import PACK, RUN_SECONDS, find_comfyui

pytestmark = [pytest.mark.comfyui, pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")]


@pytest.fixture(scope="module")
def previews() -> dict:
    """Run inside_previews.py with ComfyUI's interpreter and the bundled weights."""
    comfyui, python = find_comfyui()
    script = Path(__file__).with_name("inside_previews.py")
    command = [str(python), str(script), str(comfyui), str(PACK)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_the_strip_resembles_the_decoded_frames(previews: dict) -> None:
    demo = previews["demo"]
    assert demo["tiny"] > 22 and demo["tiny"] > demo["means"] + 0.3  # the best of any 8x8 map


def test_comfyuis_own_previews_are_the_same_pictures(previews: dict) -> None:
    demo = previews["demo"]
    assert set(map(tuple, demo["bars"])) == {(64, 64)}
    assert demo["core"] > 22 and demo["other"]


def test_pictures_go_on_from_chunk_to_chunk_and_take_little_of_the_time(previews: dict) -> None:
    assert previews["in_turn"] == {"goes_on": True, "spares": True}


def test_a_published_decoder_gives_what_comfyuis_own_class_gives(previews: dict) -> None:
    assert previews["as_core"]["spread"] > 0.1 and max(previews["as_core"]["apart"]) < 1e-5


def test_a_decoder_is_read_by_its_name(previews: dict) -> None:
    files = previews["files"]
    assert files["none"] and files["normalised"] and files["raw"]


def test_a_bad_decoder_is_left_out_with_a_notice(previews: dict) -> None:
    assert previews["files"]["bad"] and "taew2_1" in previews["files"]["notices"][0]


def test_a_decoder_that_cannot_be_opened_is_left_out_with_a_notice(previews: dict) -> None:
    assert previews["files"]["dangling"] and len(previews["files"]["notices"]) == 2


def test_a_decoder_that_fails_gives_way_to_the_linear_map(previews: dict) -> None:
    assert previews["error"]["linear"] and len(previews["error"]["said"]) == 1
    assert "no memory" in previews["error"]["said"][0]


def test_without_a_decoder_pictures_are_as_large_as_the_frame(previews: dict) -> None:
    assert previews["files"]["linear"] == [80, 48]
