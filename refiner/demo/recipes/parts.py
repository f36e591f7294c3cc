"""What the stages share: learning-rate curve, optimiser with a running average, random streams by step."""

import copy
import math

import numpy as np
import torch
from torch import nn


def warm_cosine(index: int, steps: int, warm: int = 100, floor: float = 0.02) -> float:
    """Factor on the learning rate: up over `warm` steps, then down a half cosine to `floor`."""
    fall = 0.5 * (1 + math.cos(math.pi * min(index / steps, 1)))
    return min(1.0, (index + 1) / warm) * (floor + (1 - floor) * fall)


class Learner:
    """A model, its AdamW and its running average: all the state of a training that is not data."""

    def __init__(self, model: nn.Module, learning_rate: float, average: float, betas=(0.9, 0.99), decay=0.0) -> None:
        self.model = model
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self.learning_rate, self.keep = learning_rate, average
        self.optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=betas, weight_decay=decay)

    def step(self, loss: torch.Tensor, index: int, factor: float, clip: float = 1.0) -> None:
        """One optimisation step on `loss` at `factor` times the learning rate; then the average follows."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        keep = min(self.keep, (index + 1) / (index + 10))  # short at first, so that it forgets the start
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)

    def state_dict(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")}

    def load_state_dict(self, state: dict) -> None:
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)


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
