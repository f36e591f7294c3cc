"""Ctrl-C and SIGTERM: each ends a command with KeyboardInterrupt, at any moment, and is never
lost."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # exit status, as a shell gives it for Ctrl-C
SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = 5.0  # seconds until an interrupt that nobody has caught is raised again
SOON = 0.05  # seconds until an interrupt is tried again that came at a bad moment
Handler = Callable[..., object]


def interrupt(*_: object) -> None:
    """Handle a signal by KeyboardInterrupt, again and again until somebody catches it.

    One that is raised within a finaliser or a callback of a library is swallowed there.
    """
    call_later(interrupt, AGAIN)
    raise KeyboardInterrupt


def call_later(handler: Handler, seconds: float) -> None:
    """Call a signal's handler after so many seconds, where the system has such timers."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def handle(handler: Handler, instead_of: tuple[object, ...] | None = None) -> dict[int, object]:
    """Handle signals as `handling` does, for good; returns the handlers before, by signal."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.getsignal(number) for number in SIGNALS}
    replaced = {
        number: current
        for number, current in before.items()
        if (
            current in instead_of
            if instead_of
            else (number, current) != (signal.SIGINT, signal.SIG_IGN)
        )
    }
    for number in replaced:
        signal.signal(number, handler)
    return replaced


@contextmanager
def handling(handler: Handler, instead_of: tuple[object, ...] | None = None) -> Iterator[None]:
    """Handle the signals that end a command by `handler`; only where their handler is one of
    `instead_of`, if given.

    An ignored Ctrl-C, as of a job in the background, stays ignored. Only the main thread is told of
    signals.
    """
    before = handle(handler, instead_of)
    try:
        yield
    finally:
        if before:
            settle()
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def settle() -> None:
    """Raise no interrupt again: it was caught."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


def ignore_in_worker(*_: object) -> None:
    """Leave the end of a worker process to the process that began it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
