"""`autorefiner demo transitions`: rows are measured once; a caption rules once it leads."""

from pathlib import Path

import numpy as np
import pytest

from autorefiner.refiner.cli import main
from autorefiner.refiner.demo import evaluation, transitions
from autorefiner.refiner.demo.clips import held_out, truth_clips

from tiny_bundle import use_bundle, write_tiny_bundle


def test_a_small_version_runs_and_measures_nothing_twice(tmp_path: Path, monkeypatch) -> None:
    models = tmp_path / "models"
    write_tiny_bundle(models)
    use_bundle(models, monkeypatch.setattr)
    for module in (transitions, evaluation):
        monkeypatch.setattr(module, "WEIGHTS", models, raising=False)
    monkeypatch.setattr(transitions, "WINDOWS", (6,))
    run, out = tmp_path / "run", tmp_path / "RESULTS.md"
    sizes = ["--pairs", "1", "--chunks", "1", "--run", str(run), "--out", str(out)]
    command = ["demo", "transitions", *sizes, "--device", "cpu"]
    assert main(command) == 0
    text = out.read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    names = [line.split("|")[2].strip() for line in table[2:]]
    assert names == list(transitions.TRANSITIONS)
    assert len(list(run.iterdir())) == len(names)
    monkeypatch.setattr(transitions, "sampled", lambda *_: pytest.fail("measured again"))
    assert main(command) == 0
    assert out.read_text() == text


def test_a_caption_rules_from_when_it_leads_to_the_end() -> None:
    never = float("inf")
    for leads, wait in (([1, 1], 0), ([-1, 1], 1), ([1, 0, 1], 2), ([1, -1], never)):
        assert transitions.chunks_until(np.array(leads)) == wait
    assert transitions.summary([0, 0, 2, never], 4) == ["2 (0 to >= 4)", "50 %", "25 %"]


def test_a_second_is_scored_under_the_caption_that_it_shows() -> None:
    (old, new), *_ = transitions.caption_pairs(2)
    assert not transitions._looks(old) & transitions._looks(new)
    captions = held_out(40)
    clip = list(truth_clips(captions[: captions.index(new) + 1]))[-1]
    seconds = transitions.seconds_of(clip, 2)
    assert [len(second) for second in seconds] == [16, 16]
    assert (seconds[0] == clip[41:57]).all()
    assert transitions.alignment(seconds[0], new) > transitions.alignment(seconds[0], old) + 50
