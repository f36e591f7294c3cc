"""Ctrl-C and SIGTERM at any moment: one line, exit status 130, no traceback, never ignored."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autorefiner.refiner import stopping
from autorefiner.refiner.stopping import INTERRUPTED, handling, interrupt

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
# A sitecustomize that signals this process when a module is imported, or at exit.
AT_END = "the end"
SENDER = """
import atexit, os, signal, sys, time
def send():
    os.kill(os.getpid(), {number})
    time.sleep(0.01)  # Python 3.10 loses a signal without bytecode after it
if {module!r} == {at_end!r}:
    atexit.register(send)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
"""


def ended(command: list[str], folder: Path, module: str, number: int) -> tuple[int, list[str]]:
    """Return exit status and stderr lines of a command signalled while it imports a module."""
    (folder / "sitecustomize.py").write_text(
        SENDER.format(module=module, number=int(number), at_end=AT_END)
    )
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        command, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), check=False,
    )  # fmt: skip
    return ran.returncode, ran.stderr.splitlines()


@BOTH
@pytest.mark.parametrize(
    "module", ["torch", "av", "autorefiner.refiner.cli", "torch._dynamo", "numpy"]
)
def test_a_signal_while_libraries_load_is_one_line(tmp_path, module, number) -> None:
    command = [sys.executable, "-m", "autorefiner", "bench", "--chunks", "2"]
    status, lines = ended(command, tmp_path, module, number)
    if status == 0:
        pytest.skip(f"{module} is not imported by this torch")
    assert (status, lines) == (INTERRUPTED, ["stopped"])


@BOTH
@pytest.mark.parametrize("command", ["autorefiner", "autorefiner.nodes.cli"])
@pytest.mark.parametrize("module", ["torch", AT_END])
def test_a_signal_at_either_end_of_a_command_is_one_line(tmp_path, command, module, number) -> None:
    assert ended([sys.executable, "-m", command, "--help"], tmp_path, module, number) == (
        INTERRUPTED,
        ["stopped"],
    )


@BOTH
def test_the_installed_command_is_the_one_that_is_tried_here(tmp_path, number) -> None:
    script = Path(sys.executable).with_name("autorefiner")
    if not script.exists():
        pytest.skip("the package is not installed as a command")
    assert ended([str(script), "--help"], tmp_path, "torch", number) == (INTERRUPTED, ["stopped"])


def test_nothing_heavy_is_imported_before_signals_are_handled() -> None:
    code = (
        "import sys, autorefiner.__main__; print(sorted({'torch', 'numpy', 'av'} & {*sys.modules}))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


@BOTH
def test_an_interrupt_that_is_swallowed_comes_again(monkeypatch, number) -> None:
    """Python prints and forgets an exception raised in a finaliser."""
    monkeypatch.setattr(stopping, "AGAIN", 0.5)
    seen: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: seen.append(args.exc_type.__name__))

    class Swallows:
        def __del__(self) -> None:
            signal.raise_signal(number)  # to this thread: os.kill may come late

    before = signal.signal(number, signal.SIG_DFL)  # a background job's SIGINT is ignored
    try:
        with pytest.raises(KeyboardInterrupt), handling(interrupt):
            Swallows()
            assert seen == ["KeyboardInterrupt"]
            time.sleep(5)
        time.sleep(1)  # caught: no second one follows
    finally:
        signal.signal(number, before)


def test_what_was_ignored_or_handled_elsewhere_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handling(interrupt):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is interrupt
        with handling(interrupt, instead_of=(signal.default_int_handler,)):
            assert signal.getsignal(signal.SIGTERM) is not interrupt
    finally:
        signal.signal(signal.SIGINT, before)
