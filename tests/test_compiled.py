"""Compiled parts of a pass: the clips of plain runs, and what happens where compiling fails."""

from dataclasses import replace

import pytest
import torch
from accelerated_runs import WINDOW, clip
from torch import Tensor

from autorefiner.refiner.memory.reflect import ReflectiveCache
from autorefiner.refiner.noise.refiner import Branches, Refiner, merged
from autorefiner.refiner.wan.compiled import Compiler, compiled_network, rotate_pairs
from autorefiner.refiner.wan.rope import rotate, rotation_table

from tiny import tiny_network
from tiny_refiner import pairs_for


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rope_by_real_numbers_is_rope(dtype: torch.dtype) -> None:
    x = torch.randn(2, 12, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    table = rotation_table((5, 900), 2, 3, 32, like=x)
    torch.testing.assert_close(rotate_pairs(x, torch.view_as_real(table)), rotate(x, table))


@pytest.mark.parametrize(
    ("previous", "positions"), [("pending", "absolute"), ("joint", "relative")]
)
def test_a_compiled_run_is_the_plain_one(previous: str, positions: str) -> None:
    """By a backend that traces and does not compile, so there is no C++ compiler needed."""
    torch._dynamo.reset()
    compiler, network = Compiler(backend="eager"), tiny_network()
    refiner = Refiner(
        merged(network, pairs_for(network)), ReflectiveCache("shared", previous), frozenset((500,))
    )
    faster = replace(refiner, network=compiled_network(refiner.network, compiler))
    run = dict(preset=WINDOW.changed(positions=positions, window=3), frames=4)
    compiled = clip(compiled_network(network, compiler), refiner=faster, **run)
    torch.testing.assert_close(compiled, clip(network, refiner=refiner, **run))
    assert not compiler.failure and compiler.seconds > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    spent = compiler.seconds
    clip(compiled_network(network, compiler), **run)
    assert compiler.seconds == spent


def test_branches_that_come_after_a_compiled_run_count() -> None:
    torch._dynamo.reset()
    network, run = tiny_network(), dict(preset=WINDOW.changed(window=3), frames=2)
    faster = compiled_network(network, Compiler(backend="eager"))
    clip(faster, **run)
    branches = Branches(network.model, pairs_for(network))
    refiner = Refiner(network, levels=frozenset((500,)), on=branches.on)
    compiled = clip(faster, refiner=replace(refiner, network=faster), **run)
    torch.testing.assert_close(compiled, clip(network, refiner=refiner, **run))


def test_a_higher_limit_of_recompiling_stays() -> None:
    with torch._dynamo.config.patch(recompile_limit=1000):
        Compiler()(rotate_pairs)
        assert torch._dynamo.config.recompile_limit == 1000


def test_a_run_goes_on_where_nothing_can_be_compiled() -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no compiler here\nand more")

    torch._dynamo.reset()
    compiler, network = Compiler(backend=fails), tiny_network()
    with pytest.warns(UserWarning, match="no compiler here") as caught:
        compiled = clip(compiled_network(network, compiler), frames=2)
    torch.testing.assert_close(compiled, clip(network, frames=2))
    assert len(caught) == 1 and compiler.failure


def test_a_later_graph_that_cannot_be_compiled_ends_no_run(monkeypatch) -> None:
    """As of a decoder: its state grows, which its arguments do not show."""
    calls = []

    def compiled(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) > 1:
            raise RuntimeError("no compiler any more")
        return x + 1

    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled)
    compiler, x = Compiler(), torch.ones(2)
    add = compiler(lambda x: x + 1)
    add(x)
    with pytest.warns(UserWarning, match="any more"):
        assert torch.equal(add(x), x + 1)
    assert compiler.failure


def test_an_error_of_the_function_is_none_of_the_compiler(recwarn) -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("of its own")

    compiler = Compiler(backend="eager")
    with pytest.raises(RuntimeError, match="of its own"):
        compiler(fails)(torch.ones(2))
    assert not compiler.failure and not any("uncompiled" in str(w.message) for w in recwarn)
