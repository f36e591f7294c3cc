"""A refiner in a run: read, checked against the model and the preset, counted in bytes, and attached in a form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from .noise.file import RefinerCard, load_refiner, other_base
from .noise.refiner import Branches, Refiner, check_pairs, merged
from .wan.causal import CausalWan
from .wan.lora import LoraPair
from .wan.transformer import WanConfig, WanTransformer

Form = Literal["auto", "merged", "branches"]
FORMS = get_args(Form)


@dataclass(frozen=True, slots=True)
class RefinerPlan:
    """What a run's refiner will be. `form` is `auto` until the memory is known."""

    name: str
    pairs: Mapping[str, LoraPair]
    card: RefinerCard
    form: Form
    strength: float
    levels: tuple[int, ...]  # refined, nominal
    merged_bytes: int
    branch_bytes: int

    @classmethod
    def read(
        cls, path: Path | str, config: WanConfig, steps: Sequence[int], dtype: torch.dtype, *, form: Form = "auto",
        strength: float = 1.0, levels: Sequence[int] | None = None,
    ) -> "RefinerPlan":  # fmt: skip
        """From a file, for a network of these sizes and a run of these nominal steps; ValueError if it does not fit."""
        pairs, card = load_refiner(path)
        with torch.device("meta"):
            model = WanTransformer(config)
        try:
            check_pairs(pairs, model)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error
        chosen = tuple(card.levels if levels is None else levels)
        if foreign := sorted(set(chosen) - set(steps)):
            raise ValueError(
                f"refined levels {', '.join(map(str, foreign))}: this run's levels are {', '.join(map(str, steps))};"
                " name some of them with --refined-levels"
            )
        weights = sum(pair.up.shape[0] * pair.down.shape[1] for pair in pairs.values())
        factors = sum(pair.up.numel() + pair.down.numel() for pair in pairs.values())
        size = dtype.itemsize
        return cls(Path(path).name, pairs, card, form, strength, chosen, weights * size, factors * size)

    @property
    def nbytes(self) -> int:
        """What it takes beside the base."""
        return self.branch_bytes if self.form == "branches" else self.merged_bytes

    def chosen(self, merge: bool) -> "RefinerPlan":
        """The plan with its form settled."""
        return replace(self, form="merged" if merge else "branches")

    def describe(self) -> str:
        """A few words for metadata and the terminal."""
        levels = ",".join(map(str, self.levels))
        return f"{self.name}, strength {self.strength:g}, levels {levels}, {self.card.previous}, {self.form}"

    def warning(self, network: CausalWan) -> str | None:
        """A line where the refiner belongs to another base."""
        return other_base(self.card, network.model)

    def attach(self, network: CausalWan) -> Refiner:
        """T_φ on a loaded network. Branches stay on the network's modules, silent outside a refine pass."""
        used = dict(cache=self.card.cache, levels=frozenset(self.levels), strength=self.strength)
        if self.form == "branches":
            branches = Branches(network.model, self.pairs)
            return Refiner(network, on=branches.on, **used)
        return Refiner(merged(network, self.pairs), **used)
