"""A memory that fits into a budget: what is given up, in which order, and by how many bytes."""

from dataclasses import replace

import pytest
import torch

from autorefiner.refiner import estimate
from autorefiner.refiner import job as job_module
from autorefiner.refiner.cli import main
from autorefiner.refiner.fit import (
    CHOSEN,
    Budget,
    candidates,
    enough,
    fit,
    smaller_jobs,
    windows,
)
from autorefiner.refiner.job import Job, plan_job, prepare, replan
from autorefiner.refiner.latents import read_latents
from autorefiner.refiner.noise.file import RefinerCard, save_refiner
from autorefiner.refiner.video import read_metadata

from tiny import tiny_network
from tiny_command import command, parse
from tiny_refiner import RANK, pairs_for

FRAME = 2 * 2 * 6 * 128 * 4  # bytes of a frame's keys and values: 2 layers, 3x2 tokens, fp32
LONG = ("--frames", "57")  # 15 latent frames, 5 chunks
LEVELS = ("--levels", "1000,500")


@pytest.fixture(scope="module")
def refiner(files) -> str:
    path = files / "a.refiner.safetensors"
    save_refiner(path, pairs_for(tiny_network()), RefinerCard(rank=RANK))
    return str(path)


def planned(files, *extra: str) -> Job:
    return plan_job(parse(command(files, files / "unwritten.mp4", "--dry-run", *LONG, *extra)))


def exactly(nbytes: int) -> Budget:
    return Budget(f"{nbytes} bytes", nbytes)


def sampled(files, out, *extra: str) -> tuple[torch.Tensor, dict[str, str]]:
    assert main(command(files, out, *LONG, *LEVELS, "--save-latents", *extra)) == 0
    return read_latents(out.with_suffix(".latents.safetensors"))[0], read_metadata(out)


@pytest.fixture(scope="module")
def without(files, refiner, tmp_path_factory) -> tuple[torch.Tensor, dict[str, str]]:
    """Sample without a budget."""
    return sampled(files, tmp_path_factory.mktemp("without") / "a.mp4", *refined(refiner))


def refined(refiner: str) -> tuple[str, ...]:
    return "--refiner", refiner, "--refined-levels", "500"


def by_hand(choices: str) -> list[str]:
    """Return the options that state what a line says."""
    flags = {"refiner": "--refiner-form"}
    pairs = [choice.split() for choice in choices.split(", ")]
    return [part for word, value in pairs for part in (flags.get(word, f"--{word}"), value)]


def test_a_large_budget_changes_nothing(files, refiner, without, tmp_path, capsys) -> None:
    extra = refined(refiner)
    latents, metadata = sampled(files, tmp_path / "a.mp4", *extra, "--fit", "900000GB")
    assert "fit 900000GB: nothing to change: " in capsys.readouterr().err
    assert torch.equal(latents, without[0]) and metadata == without[1]
    job = planned(files, *extra)
    assert fit(job.options, exactly(job.estimate.total)).job.options == job.options


def test_choices_stated_by_hand_give_the_same_clip(
    files, refiner, without, tmp_path, capsys
) -> None:
    extra = refined(refiner)
    job = planned(files, *extra)
    last = min(smaller_jobs(job), key=lambda each: each.estimate.total)
    size = f"{last.estimate.total / 1e6:.6f}MB"
    latents, metadata = sampled(files, tmp_path / "a.mp4", *extra, "--fit", size)
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("fit"))
    choices = line.split(": ")[1]
    assert choices == "window 9, sink 3, store int8, refiner unmerged"
    stated, same = sampled(files, tmp_path / "b.mp4", *extra, *by_hand(choices))
    assert torch.equal(latents, stated) and metadata == same
    assert (metadata["window"], metadata["store"]) == ("9, sink 3", "int8")
    assert metadata["refiner"].endswith("unmerged")
    assert not torch.equal(latents, without[0])


def test_the_first_candidate_that_fits_is_taken(files, refiner) -> None:
    job = planned(files, "--refiner", refiner)
    tried = [job, *smaller_jobs(job)]
    forms = [(store, form) for store in (None, "int8") for form in ("auto", "unmerged")]
    assert [
        (each.options.window, each.options.store, each.options.refiner_form) for each in tried
    ] == [(window, *pair) for window in (None, 12, 9) for pair in forms]
    # 3 frames more for the tokens of a refine pass
    plain = [each.estimate.kv for each in tried if each.options.store is None]
    assert plain == [FRAME * (window + 3) for window in (15, 15, 12, 12, 9, 9)]
    saved = job.refiner.merged_bytes - job.refiner.branch_bytes
    assert [tried[0].estimate.total - each.estimate.total for each in tried[1:5:3]] == [
        saved, 3 * FRAME,
    ]  # fmt: skip
    totals = [each.estimate.total for each in tried]
    for budget in (*totals, totals[0] - 1):
        chosen = fit(job.options, exactly(budget)).job
        first = next(each for each in tried if each.estimate.total <= budget)
        assert chosen.options == first.options and chosen.estimate.total <= budget


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("--frames", "161"),
        ("--preset", "causal-forcing", "--sink", "6"),
        ("--frames", "161", "--preset", "reward-forcing"),
        ("--frames", "endless", "--method", "hiar", "--store", "int8"),
        ("--frames", "45", "--recipe", "extend 1"),
        ("--frames", "57", "--memory", "rolling-sink", "--window", "12"),
    ],
)
def test_a_candidate_is_the_job_that_its_options_plan(files, refiner, extra) -> None:
    given = parse(
        command(files, files / "unwritten.mp4", "--dry-run", "--refiner", refiner, *extra)
    )
    for job in smaller_jobs(plan_job(given)):
        stated = prepare(replace(given, **{name: getattr(job.options, name) for name in CHOSEN}))
        assert stated.metadata == job.metadata and stated.estimate == job.estimate
        plans = [each.plan.memory(each.config, each.dtype, True) for each in (stated, job)]
        assert plans[0] == plans[1]


@pytest.mark.parametrize("recipe", ["", "keep 6"])
def test_a_prompts_transition_follows_the_window(files, recipe) -> None:
    options = parse(
        ["generate", "--model", "random-tiny", "--size", "32x32", "--frames", "81", "--dry-run",
         "--out", str(files / "unwritten.mp4"), "--timeline", "a | b",
         "--recipe", recipe]
    )  # fmt: skip
    job = plan_job(options)
    smaller = next(each for each in smaller_jobs(job) if each.options.window == 12)
    chosen = {name: getattr(smaller.options, name) for name in CHOSEN}
    assert smaller.timeline == prepare(replace(options, **chosen)).timeline != job.timeline


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ((), [(18, 3), (15, 3), (12, 3), (9, 3)]),
        (("--frames", "77"), [(18, 3), (15, 3), (12, 3), (9, 3)]),
        (("--sink", "0"), [(18, 0), (15, 0), (12, 0), (9, 0), (6, 0)]),
        (("--frames", "33"), []),
        (("--frames", "161"), [(19, 10), (16, 10)]),
        (("--preset", "longlive"), [(9, 3)]),
        (("--preset", "krea-14b"), []),
        (("--preset", "causal-forcing-framewise", "--frames", "21"), [(5, 1), (4, 1), (3, 1)]),
        (("--memory", "ema-sink"), [(9, 3)]),
        (("--preset", "rolling-forcing", "--method", "rolling"), []),
        (("--method", "rolling"), [(18, 3)]),
        (("--window", "12"), []),
        (("--window", "-1"), []),
    ],
)
def test_windows_fall_by_whole_chunks(files, extra, expected) -> None:
    job = planned(files, "--frames", "81", *extra)
    asked, *smaller = windows(job)
    assert asked == job.options
    assert [(each.window, each.sink) for each in smaller] == expected


def test_a_window_that_the_memory_refuses_is_passed_over(files) -> None:
    job = planned(files, "--frames", "81", "--memory", "deep-sink", "--sink", "4")
    assert [each.window for each in windows(job)][1:] == [19, 16, 13, 10]
    assert [each.options.window for each in smaller_jobs(job)][1::2] == [16, 13, 10]


def test_what_is_stated_stays(files, refiner) -> None:
    stated = {"store": "plain", "window": "12", "sink": "3", "refiner-form": "merged"}
    extra = [part for name, value in stated.items() for part in (f"--{name}", value)]
    job = planned(files, "--refiner", refiner, *extra)
    assert list(candidates(job)) == [job.options]
    for number, count in enumerate((2, 3, 1, 2)):
        free = extra[: 2 * number] + extra[2 * number + 2 :]
        job = planned(files, "--refiner", refiner, *free)
        assert len(list(candidates(job))) == count
    assert len(list(candidates(planned(files)))) == 6, "without a refiner it has no form"


def test_a_gpu_moves_the_memory_to_the_host_before_it_rounds(files, monkeypatch) -> None:
    job = replace(planned(files, "--window", "-1"), device=torch.device("cuda"))
    offload, int8 = smaller_jobs(job)
    assert (offload.options.store, int8.options.store) == ("offload", "int8")
    layer = 15 * FRAME // 4  # of keys: in the host as many bytes as the next power of two
    assert offload.estimate.kv_host == 4 * (1 << (layer - 1).bit_length())
    monkeypatch.setattr(estimate, "available_bytes", lambda device: 0)
    assert [each.options.store for each in smaller_jobs(job)] == ["int8"]


def test_what_cannot_fit_is_one_line_with_the_least(files, tmp_path, capsys) -> None:
    job = planned(files)
    least = min(each.estimate.total for each in (job, *smaller_jobs(job)))
    assert fit(job.options, exactly(least)).choices == "window 9, sink 3, store int8"
    with pytest.raises(ValueError, match="least"):
        fit(job.options, exactly(least - 1))
    assert main(command(files, tmp_path / "a.mp4", *LONG, "--fit", "0.1MB")) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and f"least {enough(least)} with window 9" in message
    assert not list(tmp_path.iterdir())
    assert fit(job.options, Budget.parse(enough(least))).job.estimate.total == least
    assert [enough(count) for count in (1_200_000_001, 1_200_000_000, 48_480_001)] == [
        "1.21 GB", "1.20 GB", "48.49 MB",
    ]  # fmt: skip


def test_a_job_that_fits_is_checked_like_any_other(files, tmp_path, monkeypatch) -> None:
    options, budget = parse(command(files, tmp_path / "a.mp4", *LONG)), Budget.parse("1GB")
    monkeypatch.setattr(job_module, "available_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="free"):
        fit(options, budget)
    assert fit(replace(options, dry_run=True), budget).choices == ""
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match="overwrite"):
        fit(options, budget)


def test_bytes_at_the_peak_add_up(files) -> None:
    parts = planned(files).estimate
    turn = max(parts.activations, parts.decode)
    assert parts.total == parts.weights + parts.kv + parts.text_kv + turn
    assert sum(parts.peak.values()) == parts.total
    assert replace(parts, text_encoder=10**12).peak == {"text encoder": 10**12}
    decoding = replace(parts, decode=parts.activations + 1)
    assert "VAE decoder" in decoding.peak and "activations" not in decoding.peak
    assert "activations" in replace(decoding, activations=decoding.decode + 1).peak
    beside = replace(parts, beside=True)
    assert beside.total - parts.total == min(parts.activations, parts.decode) > 0
    assert sum(beside.peak.values()) == beside.total


def test_only_a_gpu_decodes_beside_sampling(files) -> None:
    job = planned(files)
    assert not job.decodes_beside
    gpu = torch.device("cuda")
    parts = job.options, job.files, job.config, job.plan, job.method, job.dtype, None, None, gpu
    assert job_module.estimate_memory(*parts).beside


def test_replanning_with_the_same_options_changes_nothing(files, refiner) -> None:
    job = planned(files, "--refiner", refiner, "--window", "12", "--store", "int8")
    same = replan(job, job.options)
    assert (same.metadata, same.estimate) == (job.metadata, job.estimate)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GB", 8_000_000_000),
        ("8GiB", 8_589_934_592),
        ("512MB", 512_000_000),
        ("512 mib", 536_870_912),
        ("1.5 GB", 1_500_000_000),
        ("8.1gb", 8_100_000_000),
    ],
)
def test_sizes_have_units(text, nbytes) -> None:
    assert Budget.parse(text).nbytes == nbytes


@pytest.mark.parametrize(
    "text", ["8", "8e9", "8G", "GB", "-8GB", "8GB8", "٨GB", "8TB", "", "nanGB"]
)
def test_a_size_without_a_unit_is_refused(files, text, capsys) -> None:
    with pytest.raises(ValueError, match="unit"):
        Budget.parse(text)
    with pytest.raises(SystemExit, match="2"):
        main(command(files, files / "unwritten.mp4", f"--fit={text}"))
    assert "unit" in capsys.readouterr().err
