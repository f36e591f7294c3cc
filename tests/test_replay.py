"""CUDA-graph replay of training passes: repeatable from their tensors and parameters alone."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autorefiner.refiner.noise.source import Draw, GivenNoise, WhiteNoise
from autorefiner.refiner.schedule import PRESETS, plan_chunks
from autorefiner.refiner.training import dmd_objective, refiner_stage
from autorefiner.refiner.training.options import RefineOptions
from autorefiner.refiner.training.refiner_stage import RefinerStage
from autorefiner.refiner.training.replay import Captured, Outputs, Replay, holding, replayable
from autorefiner.refiner.training.self_rollout import self_rollout
from autorefiner.refiner.wan.upload import upload

from tiny import TINY, tiny_network
from tiny_stage import SMALL, encode, stage_of

pytest.importorskip("peft")

METHODS = [
    dict(previous="pending"), dict(previous="joint"), dict(method="init-noise"),
    dict(method="lora"), dict(history="none", previous="joint"), dict(accumulation=2),
    dict(score_draws=2), dict(preset=PRESETS["causal-forcing-2step"], levels=(500,)),
]  # fmt: skip


class Repeated(Replay):
    """Replay on the CPU: a graph repeats the first call's pass on its own tensors."""

    def __init__(
        self, model: torch.nn.Module, device: torch.device, eager: bool = False, adds: bool = False
    ) -> None:
        super().__init__(model, device, eager, adds)
        self.replays = not eager

    def _capture(
        self, run: Callable[..., Outputs], function: Callable, tensors: Sequence[Tensor], fixed
    ) -> Captured:
        inputs = [torch.full_like(tensor, float("nan")) for tensor in tensors]
        self._forget()
        outputs = run(function, tensors, fixed)
        gradients = [parameter.grad for parameter in self.parameters] if run == self._learn else []

        def again() -> None:
            held = len(self.tables)
            self._forget()
            with holding(self.tables):
                new = run(function, inputs, fixed)
            assert len(self.tables) == held
            pairs = [*zip(values(outputs), values(new), strict=True)]
            if gradients:
                pairs += zip(
                    gradients, (parameter.grad for parameter in self.parameters), strict=True
                )
            for own, result in pairs:
                if own is not None:
                    own.copy_(result)

        return Captured(SimpleNamespace(replay=again), inputs, outputs, gradients)


def values(outputs: Outputs) -> list[Tensor]:
    return [*outputs.values()] if isinstance(outputs, dict) else [*outputs]


class Alone(TorchDispatchMode):
    """Fails if an operation on the device takes a tensor from the CPU."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        made = function(*arguments, **named)
        came = [
            each.device.type for each in (*arguments, *named.values()) if isinstance(each, Tensor)
        ]
        if isinstance(made, Tensor) and came and made.device.type == "meta":
            here = [
                each
                for each in arguments
                if isinstance(each, Tensor) and each.device.type == "cpu" and each.ndim
            ]
            assert not here, f"{function} takes a tensor from the CPU"
        return made


def replaying(monkeypatch: pytest.MonkeyPatch, options: RefineOptions) -> RefinerStage:
    with monkeypatch.context() as patch:
        for module in (refiner_stage, dmd_objective):
            patch.setattr(module, "Replay", Repeated)
        return stage_of(options)


@pytest.mark.parametrize("changes", METHODS)
def test_replayed_steps_are_the_ordinary_ones(
    monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    options = replace(SMALL, **changes)
    plain, replayed = stage_of(options), replaying(monkeypatch, options)
    for index in range(4):
        assert plain.step(index) == replayed.step(index)
    for left, right in (
        (plain.learner, replayed.learner),
        (plain.objective.critic, replayed.objective.critic),
    ):
        for one, other in zip(left.model.parameters(), right.model.parameters(), strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one.grad, other.grad)
    assert replayed.replay.captured
    assert len(replayed.objective.replay.captured) == 1
    assert not plain.replay.captured


def test_a_training_goes_on_where_nothing_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Captured:
        raise RuntimeError("CUDA error: out of luck\nand more")

    plain = stage_of(SMALL)
    monkeypatch.setattr(Repeated, "_capture", fails)
    replayed = replaying(monkeypatch, SMALL)
    with pytest.warns(UserWarning, match="out of luck"):
        assert replayed.step(0) == plain.step(0)
    assert replayed.step(1) == plain.step(1)
    assert not replayed.replay.captured


@pytest.mark.parametrize("changes", [METHODS[1], METHODS[2], METHODS[3]])
def test_a_steps_passes_need_nothing_from_the_cpu(
    monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    """On the meta device, whose tensors have no values to read."""
    options = replace(SMALL, **changes)
    for module in (refiner_stage, dmd_objective):
        monkeypatch.setattr(module, "mixed_precision", lambda *_: nullcontext())
    with pytest.raises(AssertionError, match="from the CPU"), Alone():
        upload(torch.ones(2), torch.device("meta"), torch.float32)
    stage, replay = stage_of(options), Replay(torch.nn.ParameterList(), torch.device("cpu"))
    for network in (stage.tree, stage.base, stage.objective.teacher, stage.objective.fake):
        network.model.to("meta")
    stage.device = torch.device("meta")
    chunks = plan_chunks(options.preset, options.frames)[1]
    clip, level = torch.empty(2, 16, options.frames, 4, 4, device="meta"), options.exits[-1]
    path = torch.empty(max(len(chunk.levels) for chunk in chunks), *clip.shape, device="meta")
    text, sigma = (
        torch.empty(2, TINY.text_len, TINY.text_dim, device="meta"),
        torch.empty(1, 2, device="meta"),
    )
    passes = (
        (stage._loss, (path, text, text, clip[None], sigma), dict(exit_level=level, weight=1.0)),
        (stage.objective._critic_loss, (clip, clip[None], sigma, text), dict(weight=1.0)),
    )
    for function, tensors, fixed in passes:
        with holding({}):
            replay._learn(function, tensors, fixed)
            with Alone():
                replay._learn(function, tensors, fixed)


@pytest.mark.parametrize("name", ["self-forcing", "causal-forcing-2step"])
def test_noises_that_were_drawn_before_make_the_same_clips(name: str) -> None:
    """Also for a first chunk with more levels than the others, and down to a level."""
    preset = PRESETS[name]
    stage = stage_of(replace(SMALL, frames=4, preset=preset, levels=preset.levels[1:]))
    context, white, chunks = encode(["a", "bb"]), WhiteNoise(5, first=3), plan_chunks(preset, 4)[1]
    for exit_level, step in enumerate(preset.levels):
        given = GivenNoise.of(white, chunks, (2, 16, 4, 4), step)
        assert len(given.noise) == sum(level.step >= step for level in chunks[0].levels)
        with torch.no_grad():
            clips = [
                self_rollout(stage.rollout(context, noise, stage.refiner()), exit_level)
                for noise in (white, given)
            ]
        assert torch.equal(*clips)
    shape, draw = (2, 16, chunks[1].length, 4, 4), Draw(chunks[1].levels[1].step)
    assert torch.equal(given(chunks[1], draw, shape), white(chunks[1], draw, shape))


@pytest.mark.parametrize(
    "changes",
    [
        dict(objective="reward"), dict(checkpointing=True), dict(compiled=True),
        dict(preset=PRESETS["longlive"], frames=15),
    ],
)  # fmt: skip
def test_other_trainings_are_not_replayed(changes: dict) -> None:
    network = tiny_network()
    assert replayable(SMALL, network)
    assert replayable(replace(SMALL, preset=PRESETS["longlive"], frames=12), network)
    assert not replayable(replace(SMALL, **changes), network)


def test_gradients_of_parts_add_up_and_those_of_whole_steps_do_not() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    for kind, adds, times in (
        (Replay, True, 2),
        (Repeated, True, 2),
        (Replay, False, 1),
        (Repeated, False, 1),
    ):
        layer.weight.grad, replay = None, kind(layer, torch.device("cpu"), adds=adds)
        for _ in range(2):
            outputs = replay(lambda x: {"loss": layer(x).sum(), "twice": 2 * x}, torch.ones(1, 2))
        assert layer.weight.grad.tolist() == [[times, times]]
        assert [*outputs] == ["loss", "twice"]
        assert not outputs["loss"].requires_grad
    replay = Replay(layer, torch.device("cpu"))
    assert not replay.forward(lambda x: (layer(x),), torch.ones(1, 2))[0].requires_grad
    assert layer.weight.grad.tolist() == [[1, 1]]
