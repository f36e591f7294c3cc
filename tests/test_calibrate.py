"""`autorefiner calibrate`: how near each head looks, and the list that it writes."""

import json
from dataclasses import replace

import pytest
import torch

from autorefiner.refiner.calibrate import Attention, Calibration, attention_by_frame
from autorefiner.refiner.cli import main
from autorefiner.refiner.memory.heads import HeadList
from autorefiner.refiner.memory.plan import MemoryPlan
from autorefiner.refiner.memory.positions import Placement
from autorefiner.refiner.wan.causal import KeyValue

COMMAND = ["calibrate", "--model", "random-tiny", "--size", "32x32"]
PROMPTS = ["--prompt", "a red fox", "--prompt", "a blue bird"]


def test_heads_differ_by_the_frames_that_they_look_at() -> None:
    """Head 0 looks at the first frame and at near ones, head 1 at all alike."""

    class Past:
        places, current, placement = (0, 3, 1, 2, 4, 5, 6), (6,), Placement((), (0,))

        def all(self, layer):
            key = torch.zeros(1, 14, 2, 12)
            near_and_first = [0, 1, 4, 5, *range(8, 14)]
            key[:, near_and_first, 0] = 40
            return KeyValue(key, key)

    attention = Attention(1, 2, chunk=6)
    plan = MemoryPlan(layers=1, heads=2, head_dim=12, batch=1, height=1, width=2, window_frames=7)
    attention.start(plan, "cpu").read(0, torch.ones(1, 2, 2, 12), Past())
    shares = attention.near_LH / attention.all_LH
    assert shares[0].tolist() == pytest.approx([1, 4 / 6])
    assert attention.all_LH[0].tolist() == pytest.approx([2 * 4 / 5, 2 * 6 / 7])
    attention.read(0, torch.ones(1, 2, 2, 12), type("Earlier", (Past,), {"current": (3,)})())
    assert attention.all_LH[0].tolist() == pytest.approx([2 * 4 / 5, 2 * 6 / 7])


def test_attention_is_a_softmax_over_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 1030, 4, generator=generator)  # more than are taken at once
    key = torch.randn(2, 6, 4, generator=generator)
    expected = (query @ key.transpose(1, 2) / 2).softmax(-1).sum((0, 1)).view(3, 2).sum(1)
    assert attention_by_frame(query, key, 3).tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_calibration_writes_the_list_that_head_windows_reads(tmp_path, capsys) -> None:
    out = tmp_path / "new" / "heads.json"
    command = [*COMMAND, *PROMPTS, "--frames", "21", "--threshold", "0.55", "--out", str(out)]
    assert main(command) == 0
    table = capsys.readouterr().out.splitlines()
    content, listed = json.loads(out.read_text()), HeadList.read(out)
    assert content["prompts"] == ["a red fox", "a blue bird"] and content["threshold"] == 0.55
    for static, layer, line in zip(listed.static, content["layers"], table[1:], strict=False):
        assert static == tuple(i for i, share in enumerate(layer["near"]) if share >= 0.55)
        assert line.count("*") == len(static) and all(0 < share <= 1 for share in layer["near"])
    assert list(out.parent.iterdir()) == [out]
    assert main(command) == 2 and "--overwrite" in capsys.readouterr().err


def test_the_threshold_decides() -> None:
    shares = Calibration(((0.8, 0.79), (0.1, 1.0)), 0.8)
    assert shares.heads == HeadList(2, ((0,), (1,)))
    assert replace(shares, threshold=0.05).heads.static == ((0, 1), (0, 1))
    assert "2 of 4" in shares.table()


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--frames", "17"], "at least 21"), (["--threshold", "1.5"], "threshold")],
)
def test_what_cannot_be_measured_is_refused(tmp_path, capsys, options, word) -> None:
    out = tmp_path / "heads.json"
    assert main([*COMMAND, "--prompt", "x", *options, "--out", str(out)]) == 2
    assert word in capsys.readouterr().err and not out.exists()
