"""Parsing of choices with knobs."""

import pytest

from autorefiner.refiner.choices import choose
from autorefiner.refiner.memory.policies import POLICIES, TopFrames
from autorefiner.refiner.samplers import SAMPLERS


def make(whole: int = 1, share: float = 0.5, *, words: str = "a") -> tuple[int, float, str]:
    return whole, share, words


TABLE = {"one": make}


def test_knobs_are_numbers_or_words() -> None:
    assert choose("one", TABLE, "thing") == (1, 0.5, "a")
    assert choose("one:whole=3", TABLE, "thing") == (3, 0.5, "a")
    assert choose("one: share = 1e-1 , whole=-2", TABLE, "thing") == (-2, 0.1, "a")
    assert choose("one:words=C:/a b.json,whole=2", TABLE, "thing") == (2, 0.5, "C:/a b.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("two", "use one of one"),
        ("", "use one of one"),
        ("one:whole=x", "whole number"),
        ("one:whole=1.5", "whole number"),
        ("one:share=", "a number"),
        ("one:share=nan", "a number"),
        ("one:other=b", "whole=1, share=0.5, words=a"),
        ("one:whole", "whole number"),
    ],
)
def test_what_cannot_be_set_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        choose(text, TABLE, "thing")
    assert "\n" not in str(error.value)


def test_every_sampler_and_policy_is_made_by_its_name() -> None:
    assert [choose(name, SAMPLERS, "method").name for name in SAMPLERS] == list(SAMPLERS)
    assert [choose(name, POLICIES, "policy").name for name in POLICIES] == list(POLICIES)
    assert choose("top-frames:k=2,recent=6", POLICIES, "policy") == TopFrames(k=2, recent=6)
    with pytest.raises(ValueError, match="threshold"):
        choose("self-refine:threshold=-1", SAMPLERS, "method")
