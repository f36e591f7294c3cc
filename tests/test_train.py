"""`autorefiner train`: its file format, and a killed training resumes as if uninterrupted."""

import json
import struct
import warnings

import pytest
import torch
from safetensors.torch import load_file

from autorefiner.refiner import train as training
from autorefiner.refiner.bundles import BUNDLES, DEMO
from autorefiner.refiner.cli import main
from autorefiner.refiner.demo.bundle import FILES, load_sprite_network, save_model
from autorefiner.refiner.demo.reward_model import SpriteVideoText
from autorefiner.refiner.demo.text_encoder import SpriteTextEncoder
from autorefiner.refiner.noise.file import fingerprint, load_refiner
from autorefiner.refiner.schedule import PRESETS
from autorefiner.refiner.train_config import TrainConfig
from autorefiner.refiner.training.options import RefineOptions
from autorefiner.refiner.wan.checkpoint import inspect, save_safetensors
from autorefiner.refiner.wan.transformer import WanTransformer

from tiny_bundle import SIZES, use_bundle, write_tiny_bundle

pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch) -> None:
    """Compare with the base on few prompts, as decoding dominates a test's time."""
    monkeypatch.setattr(training, "HELD_OUT", 2)


@pytest.fixture(autouse=True)
def bundle(tmp_path, monkeypatch):
    """Use tiny random models as the bundle: this tests the training, not what it learns."""
    models = tmp_path / "models"
    write_tiny_bundle(models)
    use_bundle(models, monkeypatch.setattr)
    return models


def write(folder, more: str = "", inner: str = ""):
    path = folder / "small.toml"
    path.write_text(
        f'out = "small.safetensors"\nsave_every = 1\nshow_every = 100\n{more}\n'
        "[refiner]\nsteps = 4\nbatch = 2\naccumulation = 1\nrank = 2\nframes = 6\nratio = 2\n"
        f"shown = 1\n{inner}\n"
    )
    return path


def rows_of(run) -> list[dict]:
    """Return the log's rows without times and without comparisons with the step before."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "signal")}
        for row in rows
    ]


@pytest.mark.parametrize("previous", ["pending", "joint", "none"])
def test_a_refiner_is_trained_and_says_how(tmp_path, bundle, previous) -> None:
    path = write(tmp_path, inner=f'previous = "{previous}"\nlevels = [750, 250]')
    assert main(["train", str(path), "--device", "cpu"]) == 0
    pairs, card = load_refiner(tmp_path / "small.safetensors")
    assert (card.rank, card.levels, card.previous, card.steps, card.objective) == (
        2,
        (750, 250),
        previous,
        4,
        "dmd",
    )
    assert card.base == fingerprint(load_sprite_network("student", bundle).model)
    assert any(pair.up.any() for pair in pairs.values())
    logged = {name for row in rows_of(tmp_path / "small_run") for name in row}
    assert {"loss", "gradient", "rms 750", "distance 750", "held-out"} <= logged
    header = (tmp_path / "small_run" / "sheet_000004.png").read_bytes()[16:24]
    # One row for the one prompt: before and after.
    assert struct.unpack(">II", header) == (8 * 66 + 2, 2 * 66 + 2)


@pytest.mark.parametrize("preset", ["self-forcing", "causal-forcing-1step"])
def test_a_plain_lora_is_written_for_comfyui(tmp_path, preset) -> None:
    path = write(tmp_path, f'preset = "{preset}"', 'method = "lora"')
    assert main(["train", str(path), "--device", "cpu"]) == 0
    assert inspect(tmp_path / "small.safetensors").kind == "lora"
    names = load_file(tmp_path / "small.safetensors")
    assert all(name.startswith("diffusion_model.") for name in names)


@pytest.mark.parametrize("preset", ["self-forcing", "causal-forcing-1step"])
def test_the_initial_noise_refiner_is_trained_on_the_initial_noise(tmp_path, preset) -> None:
    path = write(tmp_path, f'preset = "{preset}"', 'method = "init-noise"')
    assert main(["train", str(path), "--device", "cpu"]) == 0
    _, card = load_refiner(tmp_path / "small.safetensors")
    assert (card.levels, card.previous) == ((1000,), "none")


SPRITES = 'objective = "reward"\n[[rewards]]\nkind = "sprites"\nweight = 0.5'


def test_a_refiner_is_trained_by_rewards(tmp_path, bundle, capsys) -> None:
    path = write(tmp_path, inner=SPRITES + "\nframes = 3\ninterval = 2")
    command = ["train", str(path), "--device", "cpu"]
    assert main(command) == 0
    _, card = load_refiner(tmp_path / "small.safetensors")
    assert card.objective == "reward"
    for row in rows_of(tmp_path / "small_run"):
        assert row["loss"] == pytest.approx(0.03 * row["l2"] - row["reward"])
        assert row["reward"] == pytest.approx(0.5 * row["sprites"])
    assert (tmp_path / "small_run" / "loss.png").exists()
    save_model(bundle, "reward", SpriteVideoText(16, 16), None, {})
    assert main(command) == 2
    assert "another reward model" in capsys.readouterr().err


def test_a_probe_warms_the_critic_and_a_training_goes_on_from_there(
    tmp_path, bundle, capsys
) -> None:
    probed, plain = tmp_path / "probed", tmp_path / "plain"
    for folder in (probed, plain):
        folder.mkdir()
        write(folder, inner="levels = [750]")
    for _ in range(2):
        assert (
            main(
                [
                    "train",
                    str(probed / "small.toml"),
                    "--device",
                    "cpu",
                    "--probe",
                    "--batches",
                    "3",
                ]
            )
            == 0
        )
        printed = capsys.readouterr().out
        assert (
            "3 batches of 2 clips" in printed
            and "Δ at 750" in printed
            and "gain over the base +0.00000" in printed
        )
        assert len(rows_of(probed / "small_run")) == 1
        assert not (probed / "small.safetensors").exists() and not [
            *(probed / "small_run").glob("sheet*")
        ]
    for folder in (probed, plain):
        assert main(["train", str(folder / "small.toml"), "--device", "cpu"]) == 0
    assert rows_of(probed / "small_run") == rows_of(plain / "small_run")
    assert (
        main(["train", str(probed / "small.toml"), "--device", "cpu", "--probe", "--batches", "2"])
        == 2
    )
    assert "at least 3" in capsys.readouterr().err


def test_a_tenth_of_the_prompts_is_held_out() -> None:
    prompts = [str(number) for number in range(25)]
    assert training.hold_out(prompts) == (prompts[:23], prompts[23:])
    assert training.hold_out(prompts[:15]) == (prompts[:14], prompts[14:15])
    assert training.hold_out(prompts[:9]) == (prompts[:9], [])
    # HELD_OUT limits the number of prompts that are compared.
    assert training.hold_out(10 * prompts) == ((10 * prompts)[:-2], prompts[-2:])


@pytest.mark.parametrize("inner", ["", SPRITES], ids=["dmd", "reward"])
def test_a_training_that_was_stopped_goes_on_with_the_same_losses(
    tmp_path, monkeypatch, bundle, inner
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
        write(folder, inner=inner)
    assert main(["train", str(whole / "small.toml"), "--device", "cpu"]) == 0
    step = training.RefinerStage.step
    with monkeypatch.context() as patch:

        def stop(self, index: int):
            if index == 3:
                raise KeyboardInterrupt
            return step(self, index)

        patch.setattr(training.RefinerStage, "step", stop)
        assert main(["train", str(stopped / "small.toml"), "--device", "cpu"]) == 130
    assert main(["train", str(stopped / "small.toml"), "--device", "cpu"]) == 0
    assert rows_of(stopped / "small_run") == rows_of(whole / "small_run")
    left, right = (load_file(folder / "small.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_goes_on_with_what_it_was_begun_with_and_nothing_else(
    tmp_path, capsys, bundle
) -> None:
    assert main(["train", str(write(tmp_path)), "--device", "cpu"]) == 0
    rows = rows_of(tmp_path / "small_run")
    changes = {
        "seed = 1": "another seed", 'method = "lora"': "another method",
        "levels = [500]": "another levels:", SPRITES: "another objective",
    }  # fmt: skip
    for inner, said in changes.items():
        assert main(["train", str(write(tmp_path, inner=inner)), "--device", "cpu"]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "other.txt").write_text("a red star")
    assert main(["train", str(write(tmp_path, 'prompts = "other.txt"')), "--device", "cpu"]) == 2
    assert "another prompts" in capsys.readouterr().err
    others = {"teacher": WanTransformer(SIZES), "text": SpriteTextEncoder(16)}
    for name, said in (("teacher", "another teacher"), ("text", "another text encoder")):
        file = bundle / FILES[name]
        own = file.read_bytes()
        save_model(bundle, name, others[name], SIZES if name == "teacher" else None, {})
        assert main(["train", str(write(tmp_path)), "--device", "cpu"]) == 2
        assert said in capsys.readouterr().err
        file.write_bytes(own)
    longer = write(tmp_path).read_text().replace("steps = 4", "steps = 400")
    (tmp_path / "small.toml").write_text(longer)
    assert main(["train", str(tmp_path / "small.toml"), "--device", "cpu"]) == 2
    assert "another first update" in capsys.readouterr().err
    assert rows_of(tmp_path / "small_run") == rows
    (tmp_path / "small.toml").write_text(
        write(tmp_path).read_text().replace("steps = 4", "steps = 5")
    )
    assert main(["train", str(tmp_path / "small.toml"), "--device", "cpu"]) == 0
    assert rows_of(tmp_path / "small_run")[:4] == rows and len(rows_of(tmp_path / "small_run")) == 5


@pytest.mark.parametrize(
    ("more", "inner", "said"),
    [
        ("stpes = 3", "", "stpes"),
        ("", "rnak = 3", "refiner.rank?"),
        ("", 'preset = "longlive"', "refiner.preset"),
        ("", 'seed = "many"', "refiner.seed"),
        ("", "levels = [900]", "levels [900]"),
        ("", "levels = 750", "refiner.levels"),
        ("sampler_levels = [750, 1000]", "", "levels 750,1000"),
        ("sampler_levels = [1000.0]", "", "sampler_levels"),
        ('memory = "nothing"', "", "ema-sink"),
        ('positions = "nothing"', "", "relative"),
        ("window = true", "", "window"),
        ("window = 2", "", "window of 2"),
        ("", "betas = [0.9]", "betas"),
        ("", "betas = [0.9, 1]", "betas"),
        ("", 'betas = "fast"', "betas"),
        ("", "critic_warmup = -1", "critic_warmup"),
        ("", "warmup = 1.0", "warmup"),
        ("", "score_draws = 0", "score_draws"),
        ("", 'start = "tail"', "start"),
        ("", "levels = [750.0]", "refiner.levels"),
        ("", "levels = []", "levels []"),
        ('preset = "causal-forcing-1step"', "", "another method"),
        ("", 'guidance = "high"', "refiner.guidance"),
        ("", 'method = "magic"', "'magic'"),
        ("", 'previous = "some"', "pending"),
        ('prompts = "none.txt"', "", "is not there"),
        ("= 3", "", "TOML"),
        ("", 'compiled = "yes"', "refiner.compiled"),
        ("", 'objective = "reward"', "[[rewards]]"),
        ("", '[[rewards]]\nkind = "sprites"', "with 1 [[rewards]]"),
        ("", '[[rewards]]\nkind = "beauty"', "'beauty'"),
        ("", "[[rewards]]\nweight = 1", "`kind`"),
        ("", '[[rewards]]\nkind = "clip"', "rewards.path"),
        ("", '[[rewards]]\nkind = "sprites"\nweigth = 1', "rewards.weight?"),
        ("", '[[rewards]]\nkind = "sprites"\ninterval = 2', "`frames`"),
        ("", '[[rewards]]\nkind = "sprites"\nweight = nan', "rewards.weight nan"),
        ("", '[[rewards]]\nkind = "sprites"\nweight = -inf', "rewards.weight -inf"),
        ("", 'objective = "reward"\n[[rewards]]\nkind = "hps"\npath = "none"', "no model"),
        ("rewards = 3", "", "[[rewards]]"),
    ],
)
def test_what_a_file_cannot_say_is_one_line(tmp_path, capsys, more, inner, said) -> None:
    assert main(["train", str(write(tmp_path, more, inner)), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("out", "said"), [("", "`out`"), (".", "folder")])
def test_what_is_written_is_a_file(tmp_path, out, said) -> None:
    (tmp_path / "a.toml").write_text(f'out = "{out}"')
    with pytest.raises(ValueError, match=said):
        training.TrainConfig.read(tmp_path / "a.toml")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("height", (0, -2, 7), "even"),
        ("width", (0, 3), "even"),
        ("shown", (0, -1), "at least 1"),
        ("steps", (0,), "at least 1"),
        ("rank", (100_000,), "1024"),
        ("ema", (1.0, 2.0, -1.0, NAN), "to below 1"),
        ("learning_rate", (0.0, -1.0, NAN, INF, 10**400), "above 0"),
        ("critic_rate", (0.0, NAN, INF), "above 0"),
        ("flow_share", (0.0, -0.1, 1.5, NAN, INF), "above 0"),
        ("guidance", (NAN, INF, -INF, 10**400), "finite"),
        ("l2", (-1.0, NAN, INF), "penalty"),
        ("seed", (-1, 1 << 63), "from 0"),
    ],
)
def test_a_number_that_trains_nothing_is_refused(name, values, said) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} .*{said}"):
            RefineOptions(**{name: value})


def test_the_ends_of_what_may_be_told() -> None:
    least = dict(
        rank=256, height=2, width=256, shown=1, ema=0.0, l2=0.0, guidance=0.0, seed=(1 << 63) - 1
    )
    for values in (least, dict(learning_rate=1e-7, l2=1000.0, guidance=100.0)):
        options = RefineOptions(**values)
        assert {name: getattr(options, name) for name in values} == values
    for method in ("init-noise", "lora"):
        assert (
            RefineOptions(method=method, levels=(), preset=PRESETS["causal-forcing-1step"]).levels
            == ()
        )


def test_the_sprites_reward_sees_frames_of_its_size() -> None:
    with pytest.raises(ValueError, match="48x64"):
        SpriteVideoText(16, 16).embed_video(torch.rand(1, 2, 3, 64, 48), torch.tensor([0, 1]))


def test_all_levels_of_the_preset_are_refined_unless_told(tmp_path) -> None:
    read = training.TrainConfig.read
    assert read(write(tmp_path)).refiner.levels == (750, 500, 250)
    assert read(write(tmp_path, 'preset = "causvid"')).refiner.levels == (757, 522)
    assert read(write(tmp_path, inner="levels = [500]")).refiner.levels == (500,)
    own = read(
        write(tmp_path, more="sampler_levels = [1000, 750]", inner="betas = [0.0, 0.99]")
    ).refiner
    assert (own.preset.levels, own.levels, own.betas) == ((1000, 750), (750,), (0.0, 0.99))


def test_a_file_chooses_the_memory_to_train_with(tmp_path) -> None:
    def memory(more: str) -> tuple:
        preset = training.TrainConfig.read(write(tmp_path, more=more)).refiner.preset
        return preset.memory, preset.window, preset.sink, preset.positions

    assert memory("") == ("window", -1, 0, "absolute")
    assert memory('memory = "ema-sink"') == ("ema-sink", 12, 3, "sink-adjacent")
    assert memory('memory = "ema-sink:retain=0.9"\nwindow = 9\npositions = "relative"') == (
        "ema-sink:retain=0.9", 9, 3, "relative",
    )  # fmt: skip


def test_an_empty_prompts_file_is_refused(tmp_path, capsys) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    assert main(["train", str(write(tmp_path, 'prompts = "empty.txt"')), "--device", "cpu"]) == 2
    assert "is empty" in capsys.readouterr().err


def test_prompts_are_utf8_whatever_the_system_reads(tmp_path, monkeypatch) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("a red fox\nein grüner Kreis\n红色的星\n".encode("utf-8-sig"))
    read = training.Path.read_text
    usual = lambda self, encoding="latin-1", **options: read(self, encoding=encoding, **options)  # noqa: E731
    monkeypatch.setattr(training.Path, "read_text", usual)
    assert training.read_prompts(str(path)) == ["a red fox", "ein grüner Kreis", "红色的星"]
    path.write_bytes("ein grüner Kreis".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        training.read_prompts(str(path))


def test_another_base_takes_no_default_of_the_sprites(tmp_path, capsys) -> None:
    said = 'base = "own.safetensors"\nprompts = "own.txt"\n'
    for more, inner, missing in (
        ('base = "own.safetensors"', "", "prompts, vae, refiner.height, refiner.width"),
        (said + 'vae = "sprites"', "height = 4", "refiner.width"),
    ):
        assert main(["train", str(write(tmp_path, more, inner)), "--device", "cpu"]) == 2
        assert missing in capsys.readouterr().err
    write(tmp_path, said + 'vae = "sprites"', "height = 4\nwidth = 4")
    assert training.TrainConfig.read(tmp_path / "small.toml").refiner.width == 4


def test_the_preset_is_the_bases_unless_told(tmp_path) -> None:
    metadata = {"config": json.dumps({"transformer": {"num_heads": 2, "text_len": 32}})}
    model = WanTransformer(SIZES)
    for stored in ("longlive", None):
        more = {"autorefiner": json.dumps({"preset": stored})} if stored else {}
        save_safetensors(tmp_path / "own.safetensors", model.state_dict(), metadata | more)
        said = 'base = "own.safetensors"\nprompts = "own.txt"\nvae = "sprites"\n'
        for preset, expected in (("", stored), ('preset = "causvid"\n', "causvid")):
            path = write(tmp_path, said + preset, "height = 4\nwidth = 4")
            if expected is None:
                with pytest.raises(ValueError, match="set preset to raven or self-forcing"):
                    training.TrainConfig.read(path)
                continue
            config = training.TrainConfig.read(path)
            assert config.preset == expected and config.refiner.preset == PRESETS[expected]


def test_a_teacher_may_be_a_folder_and_each_of_its_files_tells_it(tmp_path, bundle) -> None:
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(
        (bundle / "sprites_teacher.safetensors").read_bytes()
    )
    assert main(["train", str(write(tmp_path, 'teacher = "teacher"')), "--device", "cpu"]) == 0
    before = training.seal(folder)
    (folder / "config.json").write_text("{}")
    assert training.seal(folder) != before


def test_prompts_that_the_sprites_do_not_understand_are_said_once(tmp_path) -> None:
    good = "a red star circles on a navy ground"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training.warn_of_misread(BUNDLES[DEMO], [good])
    with pytest.warns(UserWarning, match=r"2 of 3 .*dragon") as seen:
        training.warn_of_misread(BUNDLES[DEMO], [good, "a red dragon", " ".join([good] * 5)])
    assert len(seen) == 1
    (tmp_path / "p.txt").write_text("a red dragon\n")
    path = write(tmp_path, 'prompts = "p.txt"', "")
    with pytest.warns(UserWarning, match="dragon"):
        training.make_stage(TrainConfig.read(path), torch.device("cpu"))
