"""Figures that inside.py reports from within ComfyUI's interpreter."""

import pytest
from comfy_server import find_comfyui
from demo_files import STAND_IN

pytestmark = [pytest.mark.comfyui, pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")]


def test_the_host_has_every_function_of_the_protocol(inside: dict) -> None:
    assert inside["host"] == {}


def test_the_memory_that_is_asked_for_holds_a_chunk_and_the_keys_and_values(inside: dict) -> None:
    more = inside["asked"] - inside["chunk"]
    assert inside["kv"] == 2 * STAND_IN.num_layers * 21 * 64 * STAND_IN.dim * 4
    assert inside["kv"] <= more <= inside["kv"] + inside["frame"]


def test_a_model_that_computes_in_bf16_stays_near(inside: dict) -> None:
    assert inside["differs"] and inside["narrow"] > 0.98


def test_comfyui_can_load_an_untouched_copy(inside: dict) -> None:
    assert inside["copied"] and inside["preset"] == "self-forcing"


def test_a_chunk_that_was_made_in_fewer_passes_is_told_as_finished(inside: dict) -> None:
    # One pass, and one of three whose two repeats were not needed.
    assert inside["events"]["repeats"] == [[1, 4, 9], [2, 4, 9], [4, 4, 9]]


def test_a_finished_chunk_is_drawn_as_it_is_in_the_clip(inside: dict) -> None:
    """A search may have chosen another candidate than the last one."""
    assert inside["events"]["chosen"] == [[1, 2, 9], [2, 2, 9], [2, 2, 200]]
    assert inside["events"]["last"] == [[1, 2, 9], [2, 2, 9]]


def test_masks_by_head_and_token_hold_in_every_backend(inside: dict) -> None:
    assert len(inside["masked"]) == 5 and max(inside["masked"].values()) < 1e-5


def test_passes_are_replayed_only_where_weights_stay_in_place(inside: dict) -> None:
    assert inside["graphs"] == ["auto", "off", "off"]


def test_others_make_way_for_a_rewards_models(inside: dict) -> None:
    assert inside["freed"] == [[1000 + inside["least"], "cuda"]]


def test_comfyuis_own_loader_knows_both_networks_of_the_bundle(inside: dict) -> None:
    assert inside["kinds"] == ["WAN21_CausalAR", "WAN21"]


def test_a_streaming_decoder_gives_comfyuis_pixels_with_comfyuis_weights(inside: dict) -> None:
    streamed = inside["streamed"]
    assert streamed.pop("lengths") == [9, 4, 4, 8]
    assert streamed.pop("apart") < 1e-4
    assert all(streamed.values()), streamed


def test_a_video_is_decoded_beside_a_run_only_where_both_have_room(inside: dict) -> None:
    assert inside["room"] == [True, False, False, True]  # falling memory of a GPU; a CPU
