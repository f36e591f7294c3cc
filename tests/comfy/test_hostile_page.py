"""Requests and text from the page are limited, and files are written whole or not at all."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from autorefiner.nodes.hosts import core_nodes, standalone, wire
from autorefiner.nodes.hosts.plain import NO_LINK, plain_text


class Request:
    """A chunked request without a Content-Length."""

    content_length = None
    charset = None

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.num_taken = 0
        self.content = SimpleNamespace(iter_any=self._iterate)

    async def _iterate(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            self.num_taken += 1
            yield piece


def read(*pieces: bytes) -> object:
    return asyncio.run(wire.read_request(Request(*pieces)))


def test_a_request_without_a_length_is_read_no_further_than_the_limit() -> None:
    request = Request(b"[", *[b"0," * 20_000] * 50, b"0]")
    assert asyncio.run(wire.read_request(request)) is None
    assert request.num_taken == 3


def test_a_request_that_claims_too_much_is_not_read_at_all() -> None:
    request = Request(b"1")
    request.content_length = wire.MOST_ASKED + 1
    assert asyncio.run(wire.read_request(request)) is None
    assert request.num_taken == 0


def test_a_request_in_pieces_is_read_whole() -> None:
    filled = b'"' + b"x" * (wire.MOST_ASKED - 2) + b'"'
    assert read(b'{"a": ', b"[1]}") == {"a": [1]}
    assert read(filled) == "x" * (wire.MOST_ASKED - 2)
    assert read(filled, b" ") is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 60_000, b"\xff", b'{"a":' + b"9" * 5000 + b"}"]
)
def test_what_is_no_json_is_nothing(content: bytes) -> None:
    assert read(content) is None


def test_a_charset_that_is_none_is_nothing() -> None:
    request = Request(b"{}")
    request.charset = "evil"
    assert asyncio.run(wire.read_request(request)) is None


@pytest.mark.parametrize(
    "text", ["[[Update|https://evil.example]]", "__LNK0__", "__lnk12__", "[[[a|www.evil.example]"]
)
def test_the_pages_own_links_are_not_made_of_text(text: str) -> None:
    shown = plain_text(text)
    for markup in ("[[", "://", "www.", "__lnk"):
        assert markup not in shown.lower()
    assert shown.replace(NO_LINK, "") == text


def test_an_animation_that_cannot_be_encoded_leaves_no_file(tmp_path: Path) -> None:
    place = standalone.Place(tmp_path, tmp_path / "output")
    with standalone.running_at(place), pytest.raises(ValueError, match="webp"):
        core_nodes.SaveAnimatedWEBP.execute(
            torch.zeros(1, 1, 16_384, 3), "x", 8, False, 80, "fastest"
        )
    assert not list((tmp_path / "output").iterdir())


@pytest.mark.parametrize("lossless", [True, False])
def test_an_animation_is_read_back(lossless: bool, tmp_path: Path) -> None:
    images = torch.stack([torch.full((16, 16, 3), value) for value in (0.0, 0.5, 1.0)])
    with standalone.running_at(standalone.Place(tmp_path, tmp_path / "output")):
        path = core_nodes.SaveAnimatedWEBP.execute(images, "x", 8, lossless, 80, "fastest").ui
    with Image.open(path) as picture:
        assert picture.n_frames == 3
        picture.seek(1)
        assert abs(picture.convert("RGB").getpixel((8, 8))[0] - 128) < 6
    assert [file.name for file in path.parent.iterdir()] == [path.name]
