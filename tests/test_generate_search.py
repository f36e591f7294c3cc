"""`autorefiner generate --method best-of-n`: rewards by name, errors before loading, passes."""

from collections import Counter

import pytest
import torch

from autorefiner.refiner.cli import main
from autorefiner.refiner.generate import generate, load_network, load_vae, make_context
from autorefiner.refiner.job import prepare
from autorefiner.refiner.latents import read_latents
from autorefiner.refiner.sample import sample
from autorefiner.refiner.samplers import best_of_n, search_over_path
from autorefiner.refiner.train_config import RewardConfig
from autorefiner.refiner.training.rewards.reward import Mixture
from autorefiner.refiner.training.rewards.verifier import RewardVerifier
from autorefiner.refiner.verifiers import REWARDS
from autorefiner.refiner.video import read_metadata

from tiny_command import command, parse
from tiny_reward import write_clip

SPRITES = ("--size", "64x64", "--frames", "13", "--levels", "1000,500", "--reward", "sprites")
SEARCH = (*SPRITES, "--method", "best-of-n")


@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (best_of_n, ("--method", "best-of-n", "--candidates", "2")),
        (search_over_path, ("--method", "search-over-path:candidates=2")),
    ],
)
def test_a_search_from_the_command_line_is_that_of_a_script(files, tmp_path, make, extra) -> None:
    out, counts = tmp_path / "fox.mp4", Counter()
    job = prepare(parse(command(files, out, "--save-latents", *SPRITES, *extra)))

    def count(progress) -> None:
        counts[progress.chunk] += 1

    list(generate(job, count))
    assert counts == {chunk: job.method.passes(chunk) for chunk in job.plan.chunks}
    assert job.estimate.search > 0
    rewards = Mixture(((RewardConfig("sprites").load(), 1.0),))
    verifier = RewardVerifier(rewards, load_vae(job), ["a fox"])
    context = make_context(job)
    chunks = sample(load_network(job), context, job.plan, method=make(verifier, 2))
    x0 = torch.cat(list(chunks), dim=2)
    assert torch.equal(read_latents(tmp_path / "fox.latents.safetensors")[0], x0)
    metadata = read_metadata(out)
    assert metadata["reward"] == "sprites"
    assert metadata["method"].endswith(":candidates=2")


@pytest.mark.parametrize(
    ("extra", "keyword"),
    [
        (("--method", "best-of-n"), "--reward"),
        (("--reward", "sprites"), "best-of-n"),
        (("--candidates", "3"), "candidates"),
        ((*SEARCH, "--candidates", "1"), "at least 2"),
        ((*SPRITES, "--method", "best-of-n:candidates=3", "--candidates", "3"), "once"),
        ((*SEARCH[:-1], "best-of-m"), "search-over-path"),
        ((*SEARCH, "--reward", "bright"), "sprites"),
        ((*SEARCH, "--reward", "sprites"), "twice"),
        ((*SEARCH, "--prompt", " "), "--prompt"),
        (("--method", "best-of-n", "--reward", "sprites"), "64x64"),
        ((*SEARCH, "--reward", "clip"), "path"),
        ((*SEARCH, "--reward", "clip:path=/no/such"), "safetensors"),
        ((*SEARCH, "--reward", "clip:other=1"), "knob"),
    ],
)
def test_what_a_search_lacks_is_said_before_loading(files, tmp_path, extra, keyword) -> None:
    with pytest.raises(ValueError, match=keyword) as error:
        prepare(parse(command(files, tmp_path / "fox.mp4", *extra)))
    assert "\n" not in str(error.value)


def test_a_refiner_that_reads_pending_keys_is_refused(tmp_path) -> None:
    args = [
        "generate",
        "--model",
        "sprites",
        "--refiner",
        "sprites",
        "--out",
        str(tmp_path / "a.mp4"),
    ]
    args += ["--reward", "sprites", "--prompt", "a red star", "--method"]
    assert prepare(parse([*args, "best-of-n", "--dry-run"])).refiner.cache.previous == "pending"
    with pytest.raises(ValueError, match="pending"):
        prepare(parse([*args, "search-over-path"]))


def test_rewards_add_up_and_are_counted(files, tmp_path) -> None:
    clip = write_clip(tmp_path / "my-clip")
    both = (*SEARCH, "--reward", f"clip:path={clip},weight=0.5")
    job = prepare(parse(command(files, tmp_path / "fox.mp4", *both)))
    alone = prepare(parse(command(files, tmp_path / "fox.mp4", *SEARCH)))
    assert job.search.rewards == (RewardConfig("sprites"), RewardConfig("clip", str(clip), 0.5))
    assert job.metadata["reward"] == "sprites, clip my-clip x 0.5"
    model = RewardConfig("clip", str(clip)).load().model
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    assert 0 <= job.estimate.search - alone.estimate.search - nbytes < 1000  # position_ids
    assert job.estimate.total > job.estimate.search


def test_the_command_line_says_what_is_judged(files, tmp_path, capsys) -> None:
    args = command(files, tmp_path / "fox.mp4", *SEARCH, "--dry-run")
    assert main(args) == 0
    captured = capsys.readouterr()
    assert "best-of-n by sprites" in captured.err
    assert "rewards" in captured.out


def test_every_reward_of_training_can_be_named() -> None:
    made = {name: make(path="" if name == "sprites" else "a") for name, make in REWARDS.items()}
    assert {name: reward.kind for name, reward in made.items()} == {name: name for name in made}
