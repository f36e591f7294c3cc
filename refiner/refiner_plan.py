"""Plan a refiner in a run: check it against model and preset, count its bytes, attach it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from .memory.reflect import ReflectiveCache
from .noise.file import RefinerCard, fingerprint, load_refiner, other_base
from .noise.refiner import (
    Branches,
    Convert,
    Refiner,
    Weights,
    as_it_is,
    check_pairs,
    merged,
    own_weights,
)
from .wan.causal import CausalWan
from .wan.fp8_linear import layer_bytes
from .wan.lora import LoraPair
from .wan.transformer import WanConfig, WanTransformer

Form = Literal["auto", "merged", "unmerged"]
FORMS = get_args(Form)


def check_fit(pairs: Mapping[str, LoraPair], config: WanConfig) -> None:
    """Run `check_pairs` for a network of these sizes that is not loaded."""
    with torch.device("meta"):
        model = WanTransformer(config)
    check_pairs(pairs, model)


@dataclass(frozen=True, slots=True)
class RefinerPlan:
    """A refiner checked for a run. `form` stays `auto` until the free memory is known."""

    name: str
    pairs: Mapping[str, LoraPair]
    card: RefinerCard
    form: Form
    strength: float
    levels: tuple[int, ...]  # refined, nominal
    cache: ReflectiveCache
    merged_bytes: int
    branch_bytes: int

    @classmethod
    def read(
        cls,
        path: Path | str,
        config: WanConfig,
        run_levels: Sequence[int],
        dtype: torch.dtype,
        *,
        form: Form = "auto",
        strength: float = 1.0,
        levels: Sequence[int] | None = None,
        fp8: bool = False,
    ) -> "RefinerPlan":
        """Read a refiner for a network of these sizes and a run of these nominal levels.

        Raises ValueError when it does not fit.
        """
        pairs, card = load_refiner(path)
        try:
            check_fit(pairs, config)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error
        return cls.of(
            Path(path).name,
            pairs,
            card,
            run_levels,
            dtype,
            form=form,
            strength=strength,
            levels=levels,
            fp8=fp8,
        )

    @classmethod
    def of(
        cls,
        name: str,
        pairs: Mapping[str, LoraPair],
        card: RefinerCard,
        run_levels: Sequence[int],
        dtype: torch.dtype,
        *,
        form: Form = "auto",
        strength: float = 1.0,
        levels: Sequence[int] | None = None,
        cache: ReflectiveCache | None = None,
        fp8: bool = False,
    ) -> "RefinerPlan":
        """Plan a loaded refiner; `levels` and `cache` default to those of its training.

        `fp8`: a merged copy multiplies in fp8 (see `with_fp8`).
        Raises ValueError for levels that the run does not have, or whose noise it cannot refine.
        """
        chosen, cache = tuple(card.levels if levels is None else levels), cache or card.cache
        if foreign := sorted(set(chosen) - set(run_levels)):
            raise ValueError(
                f"refined levels {', '.join(map(str, foreign))}: this run's levels are"
                f" {', '.join(map(str, run_levels))}; refine some of them"
            )
        if max(run_levels) in chosen and cache.previous != "none":
            raise ValueError(
                f"refined level {max(run_levels)}: the initial noise has no x0 before it, which"
                f" {cache.previous!r} reads: leave that level out"
            )
        weights = sum(
            layer_bytes(layer, pair.up.shape[0], pair.down.shape[1], dtype, fp8)
            for layer, pair in pairs.items()
        )
        factors = sum(pair.up.numel() + pair.down.numel() for pair in pairs.values())
        branches = factors * dtype.itemsize
        return cls(name, pairs, card, form, strength, chosen, cache, weights, branches)

    @property
    def nbytes(self) -> int:
        """Bytes that the refiner takes besides the base."""
        return self.branch_bytes if self.form == "unmerged" else self.merged_bytes

    def chosen(self, merge: bool) -> "RefinerPlan":
        """Return the plan with its form settled."""
        return replace(self, form="merged" if merge else "unmerged")

    def describe(self) -> str:
        """Describe the refiner for metadata and the terminal."""
        levels = ",".join(map(str, self.levels))
        return (
            f"{self.name}, strength {self.strength:g}, levels {levels}, {self.cache.previous},"
            f" {self.form}"
        )

    def warning(self, network: CausalWan) -> str | None:
        """Return a warning if the refiner was trained on another base model."""
        return other_base(self.card, fingerprint(network.model))

    @contextmanager
    def attached(
        self,
        network: CausalWan,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        weights: Weights = own_weights,
        convert: Convert = as_it_is,
    ) -> Iterator[Refiner]:
        """Attach T_φ to a loaded network for a run; afterwards the network is as it was before.

        A host that stores weights elsewhere passes device and dtype of the branches, and a function
        that returns a layer's weights (see `merged`, also for `convert`).
        """
        options = dict(cache=self.cache, levels=frozenset(self.levels), strength=self.strength)
        if self.form != "unmerged":
            copied = merged(network, self.pairs, weights=weights, convert=convert)
            del network  # which its owner may convert and free
            yield Refiner(copied, **options)
            return
        branches = Branches(network.model, self.pairs, dtype, device)
        try:
            yield Refiner(network, on=branches.on, **options)
        finally:
            branches.remove()
