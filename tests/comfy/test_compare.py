"""Compare Videos: figures of two clips, refused input, and files for the page to play."""

from pathlib import Path

import pytest
import torch
from comfy_graphs import node, small
from comfy_server import Server, find_comfyui

from autorefiner.nodes.compare import CompareVideos
from autorefiner.nodes.hosts.standalone import VideoFile
from autorefiner.refiner import estimate
from autorefiner.refiner.video import VideoWriter, as_bytes, read_frames

COMFYUI = [pytest.mark.comfyui, pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI")]


def clip(frames: int = 5, side: int = 32, value: float = 0.5) -> torch.Tensor:
    return torch.full((frames, side, side, 3), value)


def test_it_tells_how_far_two_clips_are_apart(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 32, 32, 8) as writer:
        writer.write(as_bytes(clip()))
    for same in (clip(), VideoFile(8, clip()), VideoFile(8, path=tmp_path / "a.mp4")):
        apart = float(CompareVideos.execute(clip(), same, 16).ui.split()[4])
        assert apart < 2  # encoding loss of a file
    assert CompareVideos.execute(clip(), clip(), 16).ui == "5 frames; mean difference 0.0 of 255"
    assert (
        CompareVideos.execute(clip(), clip(value=1.0), 16).ui
        == "5 frames; mean difference 127.0 of 255"
    )
    assert CompareVideos.execute(clip(9), clip(), 16).ui.startswith(
        "9 and 5 frames; mean difference 0.0"
    )


@pytest.mark.parametrize("other", [clip(side=64), VideoFile(8, clip(side=64))])
def test_clips_of_two_sizes_are_refused(other: object) -> None:
    with pytest.raises(ValueError, match=r"32x32 .* 64x64"):
        CompareVideos.execute(clip(), other, 16)
    with pytest.raises(ValueError, match="even width"):
        CompareVideos.execute(clip(side=33), clip(side=33), 16)


def test_clips_that_do_not_fit_in_memory_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(estimate, "available_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="free"):
        CompareVideos.execute(clip(), clip(), 16)


@pytest.mark.parametrize("kind", ["images", "video"])
class TestInComfyUI:
    pytestmark = COMFYUI

    def test_both_clips_lie_in_the_folder_of_previews(self, kind: str, server: Server) -> None:
        graph = small("text_to_video")
        graph["3"]["inputs"]["length"] = 21
        shown = ["4", 0] if kind == "images" else ["5", 0]
        graph["9"] = node("AutoRefinerCompareVideos", base=["4", 0], refined=shown, fps=8)
        output = server.run(graph)["outputs"]["9"]
        assert output["text"] == ["21 frames; mean difference 0.0 of 255"]
        paths = [server.base / "temp" / clip["filename"] for clip in output["autorefiner_compare"]]
        assert [clip["type"] for clip in output["autorefiner_compare"]] == ["temp", "temp"] and len(
            set(paths)
        ) == 2
        assert [len(read_frames(path)) for path in paths] == [21, 21]
