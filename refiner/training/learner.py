"""What trainings share: learning-rate curve, optimiser with a running average, random streams by
step."""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from .distributed import whole

AVERAGED = (
    8  # a running average is of the last eighth of a run that is shorter than its longest memory
)
NORMS = 50  # of the last updates, whose median limits the next one's
LOOSE = 4.0  # times the median


def warm_cosine(index: int, steps: int, warm: int = 100, floor: float = 0.02) -> float:
    """Factor on the learning rate: up over `warm` steps, then down a half cosine to `floor`."""
    fall = 0.5 * (1 + math.cos(math.pi * min(index / steps, 1)))
    return min(1.0, (index + 1) / warm) * (floor + (1 - floor) * fall)


def warm_root(
    index: int, steps: int, warm: int = 100, hold: float = 0.1, cool: float = 0.25
) -> float:
    """Factor on the learning rate of a long run: up, held, down with the root of the steps, then to
    0 at the end."""
    falling = min(1.0, math.sqrt(hold * steps / (index + 1)))
    ending = min(1.0, (1 - index / steps) / cool)
    return min(1.0, (index + 1) / warm) * falling * ending


def muon_optimizer() -> type[torch.optim.Optimizer]:
    """Muon; ValueError where torch is too old for it, which is newer than all else here needs."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"this training needs torch 2.9 or newer, for Muon, and torch is {torch.__version__}"
        )
    from .muon import Muon

    return Muon


class MuonAdamW:
    """Muon on weight matrices and convolution kernels, AdamW on all else; behaves as one optimiser.

    Muon (Jordan et al. 2024) steps along the orthogonalised momentum. It takes matrices only, so a
    kernel goes in as a view [out, in * taps] of itself. `rate` is AdamW's; Muon's is `muon` times
    the same factor. Muon's steps are all of one size, so a matrix whose output meets no norm grows
    under it: those whose names hold one of `spared` are AdamW's, too.
    """

    def __init__(
        self, model: nn.Module, rate: float, muon: float, betas: tuple[float, float], decay: float,
        spared: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        named = [
            (name, p)
            for name, p in model.named_parameters()
            if not any(part in name for part in spared)
        ]
        self.kernels = [p for _, p in named if p.ndim > 1 and len(p) > 1 and p[0].numel() > 1]
        others = [p for p in model.parameters() if all(p is not kernel for kernel in self.kernels)]
        self.matrices = [
            nn.Parameter(kernel.data.flatten(1)) for kernel in self.kernels
        ]  # of the same memory
        self.muon = muon_optimizer()(self.matrices, muon, weight_decay=decay)
        self.adamw = torch.optim.AdamW(others, rate, betas=betas, weight_decay=0.0)
        self.rates = ((self.muon, muon), (self.adamw, rate))

    def set_factor(self, factor: float) -> None:
        for optimizer, rate in self.rates:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor

    def step(self) -> None:
        for matrix, kernel in zip(self.matrices, self.kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        load_optimizer(self.muon, state["muon"])
        load_optimizer(self.adamw, state["adamw"])


class AdamW:
    """AdamW alone, with the interface of the above."""

    def __init__(
        self, model: nn.Module, rate: float, betas: tuple[float, float], decay: float
    ) -> None:
        self.adamw = torch.optim.AdamW(model.parameters(), rate, betas=betas, weight_decay=decay)
        self.rate = rate
        self.step, self.state_dict = self.adamw.step, self.adamw.state_dict

    def set_factor(self, factor: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = self.rate * factor

    def load_state_dict(self, state: dict) -> None:
        load_optimizer(self.adamw, state)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load what an optimiser has learnt of each parameter; its options are those that it was made
    with.

    Raises ValueError for a state of other parameters.
    """
    optimizer.load_state_dict(
        {"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]}
    )
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            shape = tuple(getattr(moment, "shape", ()))
            if not isinstance(parameter, nn.Parameter) or shape not in ((), tuple(parameter.shape)):
                raise ValueError(
                    f"the optimiser's {name} is of shape {shape}: it is of another model"
                )


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy for inference; parameters are cloned, as those of several processes' shards cannot be
    copied deeply."""
    clones = {
        id(one): nn.Parameter(one.detach().clone(), requires_grad=False)
        for one in model.parameters()
    }
    return copy.deepcopy(model, memo=clones).eval()


class Learner:
    """A model, its optimiser and its running average: all the state of a training that is not data.

    With `muon`, its learning rate, matrices and kernels but the `spared` ones are trained by Muon;
    without, everything by AdamW. An `average` of 0 is none: it is the model itself.
    """

    def __init__(
        self, model: nn.Module, learning_rate: float, average: float, betas=(0.9, 0.99), decay=0.0, muon: float = 0.0,
        spared: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.model = model
        self.average = frozen_copy(model) if average else model
        self.keep = average
        self.norms = torch.full((NORMS,), torch.nan)  # of the last updates' gradients, in turn
        self.optimizer = (
            MuonAdamW(model, learning_rate, muon, betas, decay, spared)
            if muon
            else AdamW(model, learning_rate, betas, decay)
        )

    def step(self, loss: torch.Tensor, index: int, factor: float, clip: float = 1.0) -> None:
        """One optimisation step on `loss` at `factor` times the learning rate; then the average
        follows."""
        self.zero_grad()
        loss.backward()
        self.update(index, factor, clip)

    def zero_grad(self) -> None:
        """Begin a step whose gradient comes in several backward passes."""
        self.model.zero_grad(set_to_none=True)

    def update(self, index: int, factor: float, clip: float | None = 1.0) -> None:
        """Step along the accumulated gradient, whose norm is clipped to `clip`, or without it to 4
        times the median of the last 50 updates. ValueError, and no step, where the gradient is not
        finite."""
        global _whole
        self.optimizer.set_factor(factor)
        limit = self.usual_norm() * LOOSE if clip is None else clip
        try:
            norm = torch.nn.utils.clip_grad_norm_(
                self.model.parameters(), limit, error_if_nonfinite=True
            )
        except RuntimeError as error:
            raise ValueError(
                "a gradient is not finite: lower the learning rate; the state before is kept"
            ) from error
        _whole = False
        self.norms[index % NORMS] = whole(norm).item()
        self.optimizer.step()
        if not self.keep:
            return
        keep = min(self.keep, (index + 1) / (index + AVERAGED))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.model.parameters()), 1 - keep
            )

    def usual_norm(self) -> float:
        """The median norm of the last updates' gradients; infinity before the first update."""
        median = self.norms.nanmedian().item()
        return math.inf if math.isnan(median) else median

    def allocate(self) -> None:
        """Make the optimiser's state as its first step does, without a step: what a state is read
        into in place."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.set_factor(0.0)
        self.optimizer.step()
        self.zero_grad()

    def state_dict(self) -> dict:
        names = ("model", "average", "optimizer") if self.keep else ("model", "optimizer")
        return {name: getattr(self, name).state_dict() for name in names} | {"norms": self.norms}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.keep:
            self.average.load_state_dict(state["average"])
        if "norms" in state:  # not in states of 0.1
            self.norms.copy_(state["norms"])


_whole = True


def is_whole() -> bool:
    """Whether the state of what is trained here can be saved: no update has begun since
    `mark_whole`."""
    return _whole


def mark_whole() -> None:
    """Say that the state is that between two steps, or tells how far into a step it is."""
    global _whole
    _whole = True


class FirstHalf:
    """The first of a step's two updates. It is a part of the state, so that a run may go on behind
    it."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """The step is complete, or has not begun."""
        self.index, self.logged = -1, {}

    def take(self, index: int, update: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Make the first update of step `index`, unless the state already has it; returns its
        log."""
        if self.index != index:
            self.clear()
            self.logged = update()
            self.index = index
            mark_whole()
        return dict(self.logged)

    def state_dict(self) -> dict:
        """Nothing between two steps."""
        return (
            {} if self.index < 0 else {"first_half": {"index": self.index, "logged": self.logged}}
        )

    def load_state_dict(self, state: dict) -> None:
        """From a stage's state."""
        self.clear()
        if "first_half" in state:
            index, logged = (state["first_half"][name] for name in ("index", "logged"))
            if type(index) is not int or not all(
                type(figure) is float for figure in logged.values()
            ):
                raise ValueError("the first half of a step is not whole")
            self.index, self.logged = index, logged


class LearnerStage:
    """A stage whose whole state is one learner."""

    learner: Learner

    def state_dict(self) -> dict:
        return self.learner.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.learner.load_state_dict(state)


def stream(*key: int) -> np.random.Generator:
    """Random numbers that belong to these integers (seed, step, use) and to nothing else."""
    return np.random.default_rng(key)


def noise_stream(device: torch.device, *key: int) -> torch.Generator:
    """The same for tensors on a device."""
    return torch.Generator(device).manual_seed(int(stream(*key).integers(1 << 62)))
