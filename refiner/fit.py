"""Choose a run's memory so that it fits into a number of bytes, the least loss of quality first."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice, product

from .job import Job, checked, plan_job, replan
from .request import GenerateOptions
from .schedule import get_preset
from .wan.description import format_bytes

UNITS = {"mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": 2**30}
SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?([mg]i?b)", re.ASCII | re.IGNORECASE)

# Options that are chosen unless given, with the words for them.
CHOSEN = {
    "memory": "memory",
    "window": "window",
    "sink": "sink",
    "store": "store",
    "refiner_form": "refiner",
}


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that a run may take, and how the user wrote them."""

    text: str
    nbytes: int

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Parse a number with its unit, like `8GB` or `1.5 GiB`."""
        match = SIZE.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"size {text!r}: give a number and its unit, MB or GB (powers of ten), MiB or GiB"
                " (powers of two); a number alone could mean bytes or GB"
            )
        return cls(match[0], round(float(match[1]) * UNITS[match[2].lower()]))


@dataclass(frozen=True, slots=True)
class Fit:
    """A job within a budget."""

    budget: Budget
    job: Job
    choices: str  # what was chosen; empty where the request fits as it is

    def __str__(self) -> str:
        estimate = self.job.estimate
        uses = (f"{name} {format_bytes(size)}" for name, size in estimate.peak.items() if size)
        host = f", {format_bytes(estimate.kv_host)} in host memory" if estimate.kv_host else ""
        return (
            f"fit {self.budget.text}: {self.choices or 'nothing to change'}:"
            f" {format_bytes(estimate.total)} ({', '.join(uses)}){host}"
        )


def fit(options: GenerateOptions, budget: Budget) -> Fit:
    """Plan a request with the first of its `candidates` that fits; else ValueError.

    The message names the least that the run takes.
    """
    asked = plan_job(options)
    least = asked
    for job in chain([asked], smaller_jobs(asked)):
        if job.estimate.total <= budget.nbytes:
            return Fit(budget, checked(job), choices(asked.options, job.options))
        least = min(least, job, key=lambda each: each.estimate.total)
    changed = choices(asked.options, least.options)
    raise ValueError(
        f"--fit {budget.text}: this run takes at least {enough(least.estimate.total)}"
        f"{f' with {changed}' if changed else ''}; {least.estimate.advice()}"
    )


def enough(nbytes: int) -> str:
    """Format a number of bytes, rounded up, so that a budget of it is enough."""
    digits = 10**7 if nbytes >= UNITS["gb"] else 10**4  # that two decimals of GB, or MB, show
    return format_bytes(-(-nbytes // digits) * digits)


def smaller_jobs(job: Job) -> Iterator[Job]:
    """Yield a job with each other candidate that can run."""
    for options in islice(candidates(job), 1, None):
        try:
            smaller = replan(job, options)
            smaller.estimate.check_host()
        except ValueError:  # a policy may refuse a window, the host may lack room for a store
            continue
        yield smaller


def candidates(job: Job) -> Iterator[GenerateOptions]:
    """Yield a job's options as they are, then others in the order in which they are given up.

    A form changes only the speed, a store hardly the clip: a smaller window is tried after every
    store in every form.
    """
    options = job.options
    forms = [options.refiner_form]
    if job.refiner and options.refiner_form == "auto":
        forms.append("unmerged")
    stores = [options.store]
    if options.store is None:
        stores += ["offload", "int8"] if job.device.type == "cuda" else ["int8"]
    for windowed, store, form in product(windows(job), stores, forms):
        yield replace(windowed, store=store, refiner_form=form)


def windows(job: Job) -> Iterator[GenerateOptions]:
    """Yield a job's options as they are, then with windows that fall by whole chunks.

    The least holds the sink, a chunk of history and the chunks of a pass. In place of full history
    comes a sink of one chunk. A window turns off the memory that the clip's length chose, so that
    is named.
    """
    options, preset = job.options, job.preset
    yield options
    if options.window is not None:
        return
    held = job.plan.memory(job.config, job.dtype).window_frames
    is_full = preset.window < 0 and options.sink is None
    sink = preset.chunk if is_full else preset.sink
    by_length = job.memory != get_preset(job.preset_name).memory
    memory = job.memory if by_length else options.memory
    together = job.method.together(job.plan.levels)
    for chunks in range((held - sink - 1) // preset.chunk, together, -1):
        window = sink + chunks * preset.chunk
        yield replace(options, memory=memory, window=window, sink=sink)


def choices(asked: GenerateOptions, chosen: GenerateOptions) -> str:
    """Name the options that differ."""
    pairs = [(word, getattr(asked, name), getattr(chosen, name)) for name, word in CHOSEN.items()]
    return ", ".join(f"{word} {value}" for word, before, value in pairs if value != before)
