"""Shared parts of trainings: learning rate, optimiser with running average, random streams."""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from .distributed import whole

AVERAGED = 8  # a run shorter than the average's memory averages its last eighth
NORMS = 50  # gradient norms of the last updates; their median limits the next one's
LOOSE = 4.0  # the limit, in medians


def warm_cosine(index: int, steps: int, warm: int = 100, floor: float = 0.02) -> float:
    """Return the rate's factor: up over `warm` steps, then along a half cosine to `floor`."""
    fall = 0.5 * (1 + math.cos(math.pi * min(index / steps, 1)))
    return min(1.0, (index + 1) / warm) * (floor + (1 - floor) * fall)


def warm_root(
    index: int, steps: int, warm: int = 100, hold: float = 0.1, cool: float = 0.25
) -> float:
    """Return a long run's rate factor: up, constant, down as 1/√step, then linearly to 0."""
    falling = min(1.0, math.sqrt(hold * steps / (index + 1)))
    ending = min(1.0, (1 - index / steps) / cool)
    return min(1.0, (index + 1) / warm) * falling * ending


def muon_optimizer() -> type[torch.optim.Optimizer]:
    """Import Muon; ValueError if torch is too old for it (the rest runs on older versions)."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"this training needs torch 2.9 or newer, for Muon, and torch is {torch.__version__}"
        )
    from .muon import Muon

    return Muon


class MuonAdamW:
    """Muon on weight matrices and convolution kernels, AdamW on the rest, as one optimiser.

    Muon (Jordan et al. 2024) steps along the orthogonalised momentum. It takes matrices only, so a
    kernel is passed as its view [out, in * taps]. `rate` is AdamW's learning rate, `muon` Muon's;
    both get the same factor. Muon's steps all have one size, so a matrix without a norm behind it
    grows: matrices whose names contain one of `spared` use AdamW, too.
    """

    def __init__(
        self, model: nn.Module, rate: float, muon: float, betas: tuple[float, float], decay: float,
        spared: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        named = [
            (name, p)
            for name, p in model.named_parameters()
            if not any(fragment in name for fragment in spared)
        ]
        self.kernels = [p for _, p in named if p.ndim > 1 and len(p) > 1 and p[0].numel() > 1]
        others = [p for p in model.parameters() if all(p is not kernel for kernel in self.kernels)]
        # views: they share the kernels' memory
        self.matrices = [nn.Parameter(kernel.data.flatten(1)) for kernel in self.kernels]
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
    """AdamW with the interface of MuonAdamW."""

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
    """Load an optimiser's moments, not its options; ValueError if they are another model's."""
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
    """Copy a model for inference; parameters are cloned, as FSDP's shards cannot be deep-copied."""
    clones = {
        id(one): nn.Parameter(one.detach().clone(), requires_grad=False)
        for one in model.parameters()
    }
    return copy.deepcopy(model, memo=clones).eval()


class Learner:
    """A model with its optimiser and running average.

    With `muon` (its learning rate), Muon trains matrices and kernels except the `spared` ones;
    otherwise AdamW trains everything. With `average` 0 the average is the model itself.
    """

    def __init__(
        self, model: nn.Module, learning_rate: float, average: float, betas=(0.9, 0.99), decay=0.0,
        muon: float = 0.0, spared: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.model = model
        self.average = frozen_copy(model) if average else model
        self.keep = average
        self.norms = torch.full((NORMS,), torch.nan)  # ring buffer of the last gradient norms
        self.optimizer = (
            MuonAdamW(model, learning_rate, muon, betas, decay, spared)
            if muon
            else AdamW(model, learning_rate, betas, decay)
        )

    def step(self, loss: torch.Tensor, index: int, factor: float, clip: float = 1.0) -> None:
        """Take an optimisation step on `loss` at `factor` times the learning rate."""
        self.zero_grad()
        loss.backward()
        self.update(index, factor, clip)

    def zero_grad(self) -> None:
        """Clear the gradients before a step of several backward passes."""
        self.model.zero_grad(set_to_none=True)

    def update(self, index: int, factor: float, clip: float | None = 1.0) -> None:
        """Step along the accumulated gradient, then update the average.

        The gradient's norm is clipped to `clip`; None: to 4 times the median of the last 50
        updates. ValueError, without a step, if the gradient is not finite.
        """
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
        """Return the median gradient norm of the last updates; infinity before the first."""
        median = self.norms.nanmedian().item()
        return math.inf if math.isnan(median) else median

    def allocate(self) -> None:
        """Allocate the optimiser's state without a step, so that a state can be loaded in place."""
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
    """Return whether the state is consistent: no update has begun since `mark_whole`."""
    return _whole


def mark_whole() -> None:
    """Declare the state consistent: it is between two steps, or records how far a step got."""
    global _whole
    _whole = True


class FirstHalf:
    """The first of a step's two updates, saved with the state so that a run can resume after it."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the update: the step is complete, or has not begun."""
        self.index, self.logged = -1, {}

    def take(self, index: int, update: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Run the first update of step `index`, unless the state has it; returns its figures."""
        if self.index != index:
            self.clear()
            self.logged = update()
            self.index = index
            mark_whole()
        return dict(self.logged)

    def state_dict(self) -> dict:
        """Return the update's figures; nothing between two steps."""
        if self.index < 0:
            return {}
        return {"first_half": {"index": self.index, "logged": self.logged}}

    def load_state_dict(self, state: dict) -> None:
        """Read the update from a stage's state."""
        self.clear()
        if "first_half" in state:
            index, logged = (state["first_half"][name] for name in ("index", "logged"))
            if type(index) is not int or not all(
                type(figure) is float for figure in logged.values()
            ):
                raise ValueError("the first half of a step is not whole")
            self.index, self.logged = index, logged


class LearnerStage:
    """A stage whose state is a single learner's."""

    learner: Learner

    def state_dict(self) -> dict:
        return self.learner.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.learner.load_state_dict(state)


def stream(*key: int) -> np.random.Generator:
    """Return the random stream that belongs to these integers (seed, step, use)."""
    return np.random.default_rng(key)


def noise_stream(device: torch.device, *key: int) -> torch.Generator:
    """Return the same as `stream`, for tensors on a device."""
    return torch.Generator(device).manual_seed(int(stream(*key).integers(1 << 62)))
