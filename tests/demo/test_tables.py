"""`autorefiner demo tables`: what it trains, measures, keeps and writes."""

from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from autorefiner.refiner.cli import main
from autorefiner.refiner.demo import rows, tables
from autorefiner.refiner.demo.bundle import FILES, REFINERS, WEIGHTS
from autorefiner.refiner.demo.captions import Caption, Stated
from autorefiner.refiner.demo.clips import PRESET, held_out
from autorefiner.refiner.demo.controls import Control, Kind
from autorefiner.refiner.demo.evaluation import Demo, write_section
from autorefiner.refiner.demo.metrics.evaluate import ClipScores
from autorefiner.refiner.demo.rows import Bench, Cost, Outcome, Row, counted, timed
from autorefiner.refiner.demo.tables import (
    BASE,
    KINDS,
    RANKS,
    SECTIONS,
    TABLES,
    TablesOptions,
    choose_controls,
    describe,
    how_chosen,
    machines,
)
from autorefiner.refiner.memory.reflect import Previous
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.samplers import SAMPLERS
from autorefiner.refiner.schedule import PRESETS, make_level, plan_chunks

from tiny import TINY, tiny_network
from tiny_bundle import use_bundle, write_tiny_bundle

pytest.importorskip("peft")
CPU = torch.device("cpu")


def test_a_small_version_runs_and_measures_nothing_twice(tmp_path: Path, monkeypatch) -> None:
    models = tmp_path / "models"
    write_tiny_bundle(models)
    use_bundle(models, monkeypatch.setattr)
    for module in (rows, tables):
        monkeypatch.setattr(module, "WEIGHTS", models)
    out, run = tmp_path / "RESULTS.md", tmp_path / "run"
    command = [
        "demo",
        "tables",
        "--quick",
        "--tables",
        "1",
        "--captions",
        "1",
        "--run",
        str(run),
        "--out",
        str(out),
    ]
    assert main(command) == 0
    text = out.read_text()
    for name in ("base", "+LoRA (dmd)", "+InitNoiseRefiner (dmd)", "+AutoRefiner (dmd)"):
        assert f"| {name} " in text
    before = {path.name: path.stat().st_mtime_ns for path in run.glob("*.json")}
    assert len(before) == 5
    assert main(command) == 0
    assert {path.name: path.stat().st_mtime_ns for path in run.glob("*.json")} == before
    assert out.read_text() == text
    refined = Row("", replace(TablesOptions.quick().training, seed=1))
    (run / refined.file()).unlink()
    assert main([*command, "--trained"]) == 0
    assert cells(out.read_text()) == [row for row in cells(text) if "second seed" not in row[0]]


def cells(text: str) -> list[list[str]]:
    """Return the cells of a text's Markdown tables, without the rules below their headings."""
    lines = (line.strip("|").split("|") for line in text.splitlines() if line.startswith("|"))
    rows = ([cell.strip() for cell in line] for line in lines)
    return [row for row in rows if not row[0].startswith("--")]


def test_a_section_is_written_anew_and_the_opening_stays(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n\nWhat was found.\n\n## Leverage\n\n1\n\n## The refiner\n\nold\n")
    write_section(path, "The refiner", "new")
    write_section(path, "The bundled models", "2")
    opening, *sections = path.read_text().split("\n## ")
    assert opening == "# Results\n\nWhat was found.\n"
    assert sections == ["Leverage\n\n1\n", "The refiner\n\nnew\n", "The bundled models\n\n2\n"]


def test_rows_are_timed_again_and_nothing_else_of_them_changes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(rows, "TIMED", 1)
    bench = Bench(Demo.load(WEIGHTS, CPU), held_out(1), 2, 6, tmp_path)
    before = bench.outcome(BASE, CPU)
    bench.time_again([BASE], CPU)
    after = bench.outcome(BASE, CPU)
    assert after.cost.seconds != before.cost.seconds
    assert (before.timed_on, after.timed_on) == ("", "a CPU")
    assert (after.frames, after.cost.passes) == (before.frames, before.cost.passes)
    assert repr(after.scores) == repr(before.scores)  # as text, because some are NaN


def test_every_table_compares_with_one_base_and_trains_all_rows_alike() -> None:
    options = TablesOptions()
    for number in TABLES:
        rows = KINDS[number].rows(options)
        assert rows[0].name.startswith("base") and rows[0].training is None
        assert len({row.name for row in rows}) == len(rows)
        trained = [row.training for row in rows if row.training is not None]
        assert len({(one.steps, one.batch, one.objective) for one in trained}) == 1
        assert sorted({one.seed for one in trained}) == ([0, 1] if number in (1, 8) else [0])
        assert [one.rank for one in trained] == ([*RANKS] if number == 6 else [64] * len(trained))
    levels = KINDS[3].rows(options)
    assert len({row.file() for row in levels[1:]}) == 1  # one refiner, seven choices of its levels
    assert len({row.file() for row in KINDS[4].rows(options)[1:]}) == 6
    forms, ranks = (
        {row.name: row.file() for row in KINDS[number].rows(options)[1:]} for number in (4, 6)
    )
    assert ranks["rank 64"] == forms["history shared, previous pending"]  # trained once
    names = [
        row.name
        for number in TABLES
        for row in {row.name: row for row in KINDS[number].rows(options)}.values()
    ]
    same = {row for number in TABLES for row in KINDS[number].rows(options)}
    assert len(same) == len({*names})  # a name stands for one row, whatever the table


@pytest.mark.parametrize(
    ("changed", "again"),
    [("student", {1, 2}), ("text", {1, 2}), ("teacher", {1}), ("vae", {2}), ("reward", {2})],
)
def test_factors_are_those_of_the_models_that_they_were_trained_with(
    tmp_path, monkeypatch, changed, again
) -> None:
    monkeypatch.setattr(rows, "WEIGHTS", tmp_path)
    for name in FILES.values():
        save_file({"a": torch.zeros(2), "b": torch.ones(3)}, tmp_path / name, {"step": "1"})
    trained = {number: KINDS[number].rows(TablesOptions())[-1] for number in (1, 2)}
    before = {number: row.file() for number, row in trained.items()}
    save_file(
        {"b": torch.ones(3), "a": torch.zeros(2)},
        tmp_path / FILES[changed],
        {"scores": "2", "step": "1"},
    )
    assert {number: row.file() for number, row in trained.items()} == before
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path / FILES[changed])
    assert {number for number, row in trained.items() if row.file() != before[number]} == again


def test_p_and_p_takes_a_refiners_passes_and_searches_differ_by_candidates() -> None:
    base, repeated, *others = KINDS[2].rows(TablesOptions())
    assert repeated.name == "P&P" and not base.search and base.sampler == "self-forcing"
    chunk = plan_chunks(PRESET, 21)[1][0]
    passes = {row.name: SAMPLERS[row.sampler]().passes(chunk) for row in (base, repeated)}
    assert passes == {"base": 4, "P&P": 4 + len(PRESET.levels[1:])}
    assert [(row.search, row.candidates) for row in others if row.search] == [
        ("best-of-n", 2), ("best-of-n", 5), ("search-over-path", 2), ("search-over-path", 5),
    ]  # fmt: skip
    bench = Bench(None, held_out(1), 1, 6, Path())
    untrained = [row for row in (base, repeated, *others) if row.training is None]
    assert len({bench._key(row, None) for row in untrained}) == len(untrained) == 7


def test_factors_are_found_again_when_words_about_the_preset_change() -> None:
    row = KINDS[1].rows(TablesOptions())[-1]
    training = replace(row.training, preset=replace(row.training.preset, source="another"))
    assert replace(row, training=training).file() == row.file()


def test_rows_of_two_levels_are_trained_and_sampled_with_them() -> None:
    options = replace(
        TablesOptions(),
        controls=(((1000, 750), Control("shrunk", 0.07)), (PRESET.levels, Control("shrunk", 0.1))),
    )
    base, *others = KINDS[8].rows(options)
    assert base.preset.levels == (1000, 750) and base.name == "base at 1000 750"
    assert [row.name for row in others if row.training is None] == [
        "base at 1000 500", "base at 1000 750 500", "base", "Δ = -0.07 ε at 1000 750",
    ]  # fmt: skip
    trained = [row for row in others if row.training]
    assert (
        {row.training.preset.levels for row in trained}
        == {row.sampler_levels for row in trained}
        == {(1000, 750)}
    )
    assert {row.training.levels for row in trained} == {(750,)}
    assert [row.name for row in KINDS[1].rows(options)][:2] == ["base", "Δ = -0.1 ε"]


@pytest.mark.parametrize(("kind", "expected"), [("shrunk", 0.1), ("towards x0", 0.3)])
def test_an_untrained_residual_is_its_formula(kind, expected) -> None:
    level = make_level(750, 5.0, True)
    refiner = Control(kind, 0.1).refiner(tiny_network(), (750,))
    noise, x0 = torch.full((1, 16, 3, 4, 4), -1.0), torch.full((1, 16, 3, 4, 4), 2.0)
    residual = refiner.residual(noise, x0, level, None, None, None, torch.float32)
    torch.testing.assert_close(residual, torch.full_like(noise, expected))
    assert refiner.at(level) and not refiner.at(make_level(500, 5.0, True))


@pytest.mark.parametrize("previous", get_args(Previous))
def test_a_hand_made_refiner_adds_the_bases_flow(previous: Previous) -> None:
    """Without other branches its features are the base's, so Δ is -c (v - bias) of its pass."""
    network = tiny_network()
    control = Control("hand-made", 0.1, previous).refiner(network, (750,))
    assert control.cache.previous == previous and control.levels == {750}
    torch.testing.assert_close(
        control.network.model.head.head.weight, -0.1 * network.model.head.head.weight
    )
    assert not control.network.model.head.head.bias.any()
    for name in ("blocks.0.self_attn.q.weight", "blocks.1.ffn.2.weight"):
        assert torch.equal(
            control.network.model.get_parameter(name), network.model.get_parameter(name)
        )


@pytest.mark.parametrize("kind", get_args(Kind))
def test_an_untrained_residual_of_strength_0_changes_no_run(kind) -> None:
    network, context = tiny_network(), torch.randn(1, TINY.text_len, TINY.text_dim)

    def run(refiner) -> torch.Tensor:
        plan = RunPlan(PRESET, 6, 8, 8)
        return torch.cat(list(sample(network, context, plan, refiner=refiner)), 2)

    refined = {c: run(Control(kind, c).refiner(network, (750, 500, 250))) for c in (0.0, 0.1)}
    assert torch.equal(refined[0.0], run(None))
    assert not torch.equal(refined[0.1], run(None))


def test_a_section_describes_the_trainings_of_its_tables_alone() -> None:
    options = replace(TablesOptions(), two_levels=replace(TablesOptions().two_levels, steps=7))
    words = {"240 steps": {1, 3, 4, 6}, "7 steps": {8}, "By reward": {2, 7}, "(Tables 4": {4, 6}}
    for number in TABLES:
        text = describe(replace(options, tables=(number,)))
        assert {word for word in words if word in text} == {
            word for word, numbers in words.items() if number in numbers
        }
    assert sorted(number for numbers in SECTIONS.values() for number in numbers) == [*TABLES]


def test_the_best_strength_is_chosen_on_other_captions(tmp_path, monkeypatch) -> None:
    asked: list[tuple[Row, list[str], int]] = []

    def outcome(bench: Bench, row: Row, device: torch.device) -> Outcome:
        asked.append((row, [caption.text for caption in bench.captions], bench.seeds))
        good = {0.03: 50.0, 0.05: 70.0, 0.07: 60.0, 0.1: 10.0}[row.control.c]
        return Outcome(
            [ClipScores(*[good] * len(fields(ClipScores)))] * 2, np.zeros((2, 2)), Cost(), 9, 1
        )

    monkeypatch.setattr(Bench, "outcome", outcome)
    options = TablesOptions(captions=2, tables=(1, 3))
    bench = Bench(None, held_out(2), 2, 6, tmp_path)
    chosen = choose_controls(bench, options, CPU)
    assert [(levels, str(control)) for levels, control in chosen] == [
        (PRESET.levels, formula) for formula in ("Δ = -0.05 ε", "Δ = 0.05 (x0 - ε)", "Δ = -0.05 v")
    ]
    assert len(asked) == 12 and {seeds for *_, seeds in asked} == {2}
    assert "best of 0.03, 0.05, 0.07, 0.1 on 2 other captions" in how_chosen(
        replace(options, controls=chosen)
    )
    assert (
        choose_controls(bench, replace(options, strengths=()), CPU) == ()
        and how_chosen(options) == ""
    )
    assert not {caption.text for caption in held_out(256)} & {
        text for _, texts, _ in asked for text in texts
    }


def test_passes_are_counted_by_the_network() -> None:
    cost, network = Cost(), tiny_network()
    context = torch.zeros(2, TINY.text_len, TINY.text_dim)
    plan = RunPlan(PRESETS["self-forcing"], 6, 4, 4, batch=2)
    list(sample(counted(network, cost), context, plan))
    assert cost.passes == 2 * (
        4 + 1 + 4
    )  # of two samples: four levels, what writes the memory, four levels


def test_a_row_that_is_another_by_its_name_alone_is_measured_once(
    tmp_path: Path, monkeypatch
) -> None:
    models = tmp_path / "models"
    write_tiny_bundle(models)
    monkeypatch.setattr(rows, "WEIGHTS", models)
    training = TablesOptions.quick().training
    named = {
        row.name: row for number in (1, 3) for row in KINDS[number].rows(TablesOptions.quick())
    }
    bench = Bench(None, held_out(1), 1, 6, tmp_path)
    keys = {
        name: bench._key(row, models / FILES["text"])
        for name, row in named.items()
        if row.training == training
    }
    whole = " ".join(map(str, training.levels))
    assert keys["+AutoRefiner (dmd)"] == keys[whole]
    assert len(set(keys.values())) == len(keys) - 1


def test_a_row_tells_its_machines_where_they_differ(tmp_path: Path) -> None:
    gpu = Outcome([], np.zeros((1, 2)), Cost(), 9, 1, "a GPU", "a GPU")
    gpu.write(tmp_path / "row.json", "this")
    again = Outcome.read(tmp_path / "row.json", "this")
    assert (again.trained_on, again.measured_on) == ("a GPU", "a GPU")
    base, cpu = replace(gpu, trained_on=""), replace(gpu, trained_on="a CPU")
    assert (
        machines({"base": base, "one": gpu})
        == "Rows were trained on a GPU; they were measured on a GPU."
    )
    sentence = machines({"base": base, "one": gpu, "two": gpu, "three": cpu})
    assert sentence == "Rows were trained on a GPU, `three` on a CPU; they were measured on a GPU."
    assert machines({"base": replace(base, measured_on="")}) == ""


def test_clips_of_one_object_are_told_by_motion() -> None:
    spin, swing = Stated("star", "red", "spin", speed="fast"), Stated("ring", "blue", "swing")
    captions = [Caption("", (spin,)), Caption("", (swing,)), Caption("", (spin, swing))]
    good, bad = (ClipScores(*[figure] * len(fields(ClipScores))) for figure in (100.0, 0.0))
    outcome = Outcome([good, good, bad, bad, good, bad], np.zeros((3, 2)), Cost(), 9, 1)
    lines = [line.replace(" ", "") for line in tables.by_motion(outcome, captions).splitlines()]
    assert lines[-3:] == ["|spin|2|50.0|50.0|", "|spin,fast|2|50.0|50.0|", "|swing|2|100.0|100.0|"]


def outcome_of(totals: list[float], passes: int = 0, dynamic: float = 50.0) -> Outcome:
    """Return measurements whose every score is a clip's total, but for `dynamic`."""
    figures = {field.name: 0.0 for field in fields(ClipScores)}
    scores = [
        ClipScores(**{name: total for name in figures} | {"dynamic": dynamic}) for total in totals
    ]
    spread = np.array([[1.0, 2.0]] * (len(totals) // 2))
    return Outcome(scores, spread, Cost(passes, 4, 2.0), 20, 2)


def test_a_row_tells_what_it_gains_over_the_base_by_caption() -> None:
    """Clips are seed by seed: the clips 0 and 2 are the first caption's, 1 and 3 the second's."""
    base, better = outcome_of([40.0, 60.0, 40.0, 60.0]), outcome_of([42.0, 68.0, 42.0, 68.0], 6)
    table = replace(KINDS[1], rows=lambda options: [BASE, Row("better")])
    text = tables.draw(table, TablesOptions(captions=2), {"base": base, "better": better})
    heading, first, second = cells(text)
    by_column = dict(zip(heading, second, strict=True))
    assert by_column["semantic less base's"] == "5.0 (2.0 to 8.0)"  # +2 and +8; whole captions
    assert by_column["dynamic less base's"] == "0.0 (0.0 to 0.0)"
    assert by_column["drift less base's"] == "5.0 (2.0 to 8.0)"
    assert by_column["semantic"] == "55.0 (42.0 to 68.0)"
    assert (by_column["ΔNFE"], by_column["diversity"]) == ("3", "50.0 (50.0 to 50.0)")
    assert by_column["dynamic"] == "50.0 (50.0 to 50.0)"
    assert dict(zip(heading, first, strict=True))["total less base's"] == "–"
    speed = replace(table, columns=("verifications", "frames/s"))
    assert cells(tables.draw(speed, TablesOptions(captions=2), {"base": base}))[1][-2:] == [
        "2", "10.0",
    ]  # fmt: skip


def test_the_dynamic_degree_is_resampled_by_caption() -> None:
    scores = [
        *outcome_of([50.0], dynamic=0.0).scores,
        *outcome_of([50.0], dynamic=100.0).scores,
    ]
    outcome = Outcome([*scores, *scores], np.array([[1.0, 2.0]] * 2), Cost(), 9, 1)
    assert tables.dynamic_cell(outcome, outcome, 2) == "50.0 (0.0 to 100.0)"


def test_the_residual_that_rows_start_from_has_a_row() -> None:
    flow = replace(TablesOptions().training, start="flow", flow_share=0.1)
    (row,) = tables.start_rows(flow)
    assert row.control == Control("hand-made", 0.1, "pending") and row.training is None
    joint = replace(flow, previous="joint", flow_share=0.03)
    assert tables.start_rows(joint)[0].control == Control("hand-made", 0.03)
    assert tables.start_rows(TablesOptions().training) == []  # they start from nothing
    assert str(row.control) == "Δ = -0.1 v, pending"


def test_a_measurement_is_of_its_captions_seeds_and_levels(tmp_path: Path) -> None:
    bench = Bench(Demo.load(WEIGHTS, CPU), held_out(1), 2, 6, tmp_path)
    others = (
        replace(bench, captions=held_out(1, first=5)), replace(bench, seeds=1),
        replace(bench, frames=3),
    )  # fmt: skip
    rows = (BASE, replace(BASE, sampler_levels=(1000, 750)), Row("", control=Control("shrunk", 1)))
    keys = [one._key(BASE, None) for one in (bench, *others)]
    keys += [bench._key(row, None) for row in rows]
    assert len({*keys}) == len(keys) - 1
    clips = {
        seed: [*bench._clips(BASE, bench.demo.student, None, bench.captions, seed, Cost())]
        for seed in (0, 1)
    }
    assert (clips[0][0] != clips[1][0]).any()
    seen = []

    def clips_of(self, row, network, refiner, captions, seed, cost):
        seen.append(seed)
        return iter(clips[seed])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "_clips", clips_of)
        outcome = bench.outcome(BASE, CPU)
    assert seen == [0, 1] and outcome.spreads[0, 0] > 0  # the seeds' clips differ
    assert (outcome.frames, outcome.chunks) == (42, 4)


def test_a_row_refines_its_own_levels(tmp_path: Path) -> None:
    bench = Bench(Demo.load(WEIGHTS, CPU), held_out(1), 1, 3, tmp_path)
    path = WEIGHTS / REFINERS["sprites"]
    training = TablesOptions().training
    for levels, refined in ((None, {750, 500, 250}), ((500,), {500})):
        network, refiner = bench._models(Row("", training, levels), path)
        assert network is bench.demo.student and refiner.levels == refined
    assert bench._models(BASE, None) == (bench.demo.student, None)


def test_an_untrained_residual_refines_all_levels_after_the_samplers_first(tmp_path: Path) -> None:
    bench = Bench(Demo.load(WEIGHTS, CPU), held_out(1), 1, 3, tmp_path)
    row = Row("", control=Control("shrunk", 0.1))
    two = replace(row, sampler_levels=(1000, 750))
    for one, refined in ((row, {750, 500, 250}), (two, {750})):
        assert bench._models(one, None)[1].levels == refined


def test_weights_are_other_ones_if_a_name_a_type_or_a_shape_is(tmp_path: Path) -> None:
    zeros = torch.zeros(2, 3)
    others = ({"b": zeros}, {"a": zeros.int()}, {"a": zeros.view(3, 2)}, {"a": zeros + 1})
    hashes = []
    for tensors in ({"a": zeros}, *others):
        save_file(tensors, tmp_path / "weights.safetensors")
        hashes.append(rows.weights_of(tmp_path / "weights.safetensors"))
    assert len({*hashes}) == 5
    save_file({"a": zeros}, tmp_path / "weights.safetensors", {"says": "more"})
    assert rows.weights_of(tmp_path / "weights.safetensors") == hashes[0]


def test_an_outcome_is_read_only_for_what_it_was_measured_of(tmp_path: Path) -> None:
    outcome = Outcome([], np.zeros((1, 2)), Cost(3, 0, 1.5), 9, 1)
    outcome.write(tmp_path / "row.json", "this")
    assert Outcome.read(tmp_path / "row.json", "that") is None
    again = Outcome.read(tmp_path / "row.json", "this")
    assert again.cost == outcome.cost and again.frames == 9


def test_only_making_a_clip_takes_time() -> None:
    cost = Cost()
    assert [len(clip) for clip in timed(iter([np.zeros(2), np.zeros(3)]), cost)] == [2, 3]
    assert cost.seconds > 0
