"""Hostile input in a real ComfyUI: long requests, links in its folders, markup in refiner files."""

import json
import socket
import time
from pathlib import Path

import pytest
from comfy_graphs import node
from comfy_runs import short
from comfy_server import Server, find_comfyui
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.comfyui, pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")]


@pytest.mark.parametrize("route", ["cache", "stop"])
def test_a_request_without_a_length_is_cut_off(server: Server, route: str) -> None:
    piece = b"0," * (1 << 15)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        head = f"POST /autorefiner/{route} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
        connection.sendall(
            f"{head}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        sent, answer = 0, b""
        connection.settimeout(0.01)
        while sent < 64 << 20 and not answer:
            try:
                connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
                sent += len(piece)
            except TimeoutError:
                time.sleep(0.01)
            except OSError:
                break
            try:
                answer = connection.recv(400)
            except TimeoutError:
                continue
            except OSError:
                break
    assert sent < 64 << 20, "the whole request was taken"
    assert answer[:13] in (b"", b"HTTP/1.1 400 ", b"HTTP/1.1 404 ")


def test_no_link_in_the_output_folder_leads_a_video_out(server: Server) -> None:
    outside = server.base / "outside"
    outside.mkdir()
    (server.base / "output" / "way").symlink_to(outside)
    graph = short(5)
    graph["4"] = node(
        "AutoRefinerDecodeToVideo", samples=["3", 0], vae=["1", 2], fps=8, filename_prefix="way/x"
    )
    del graph["5"], graph["6"]
    assert "leaves" in server.error(graph)["exception_message"] and not list(outside.iterdir())


def test_a_refiners_file_puts_no_markup_on_the_page_and_no_link_leads_it_out(
    server: Server, weights: Path
) -> None:
    loras = server.base / "models" / "loras"
    loras.mkdir(parents=True, exist_ok=True)
    card = {
        "rank": 64, "levels": [750, 500, 250], "history": "shared", "previous": "pending",
        "objective": "<a href=//evil.example>Update now</a> http://evil.example",
    }  # fmt: skip
    tensors = load_file(weights / "sprites.refiner.safetensors")
    save_file(
        tensors, loras / "<b>h.refiner.safetensors", metadata={"autorefiner": json.dumps(card)}
    )
    outside = server.base / "elsewhere"
    outside.mkdir()
    (loras / "way").symlink_to(outside)
    (loras / "gone.refiner.safetensors").symlink_to(outside / "new")
    graph = {
        "1": node("AutoRefinerLoadDemo"),
        "8": node(
            "AutoRefinerLoadRefiner",
            model=["1", 0],
            file="<b>h.refiner.safetensors",
            strength=1.0,
            form="auto",
        ),
        "9": node("AutoRefinerSaveRefiner", refiner=["8", 0], name="mine", overwrite=True),
    }
    shown = json.dumps(server.run(graph)["outputs"], ensure_ascii=False)
    assert "evil" in shown and not set("<>") & set(shown) and "://" not in shown
    for name in ("way/mine", "gone"):
        graph["9"]["inputs"]["name"] = name
        assert "leaves" in server.error(graph)["exception_message"]
    assert not list(outside.iterdir())
