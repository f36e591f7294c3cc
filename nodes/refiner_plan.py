"""REFINER values, and the plan of a refiner for a run with the connected options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..refiner.noise.file import RefinerCard
from ..refiner.refiner_plan import Form, RefinerPlan, check_fit
from ..refiner.wan.lora import LoraPair
from ..refiner.wan.transformer import WanConfig
from .identity import Referable
from .options import CacheOptions, ChunkSchedule


@dataclass(frozen=True, slots=True)
class RefinerLora(Referable):
    """A loaded or trained refiner: factors by layer, its card, and the options of its use."""

    name: str
    pairs: Mapping[str, LoraPair]
    card: RefinerCard
    strength: float = 1.0
    form: Form = "auto"

    def describe(self) -> str:
        """Describe the training in one line."""
        card = self.card
        levels = ", ".join(map(str, card.levels))
        trained = f"; {card.objective[:40]}, {card.steps} steps" if card.objective else ""
        modes = f"history {card.history}, previous x0 {card.previous}"
        return f"rank {card.rank}, levels {levels}, {modes}{trained}"


def plan_refiner(
    refiner: RefinerLora | None,
    config: WanConfig,
    dtype: torch.dtype,
    run_levels: Sequence[int],
    schedule: ChunkSchedule | None,
    cache: CacheOptions | None,
    goes_on: bool = False,
) -> RefinerPlan | None:
    """Plan a refiner for a run of these nominal levels; None without one, or at strength 0.

    In a run that `goes_on` from another clip, by default only the levels after the first are
    refined: there is no prediction before it. None where the refiner has none of those. Raises
    ValueError when it does not fit the network or the levels.
    """
    if refiner is None:
        return None
    card = refiner.card
    levels = (schedule and schedule.refined) or None
    if goes_on and levels is None:
        levels = tuple(step for step in card.levels if step < max(run_levels))
    try:
        check_fit(refiner.pairs, config)
    except ValueError as error:
        raise ValueError(f"REFINER {refiner.name} {error}: use a refiner of this MODEL") from error
    try:
        plan = RefinerPlan.of(
            refiner.name,
            refiner.pairs,
            card,
            sorted(run_levels, reverse=True),
            dtype,
            form=refiner.form,
            strength=refiner.strength,
            levels=levels,
            cache=cache.reflected(card.cache) if cache is not None else None,
        )
    except ValueError as error:
        raise ValueError(
            f"REFINER {refiner.name}, {error} with refined_levels of a Chunk Schedule"
        ) from error
    return plan if refiner.strength and plan.levels else None
