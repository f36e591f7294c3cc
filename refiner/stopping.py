"""Turn Ctrl-C and SIGTERM into KeyboardInterrupt, raised until it is caught."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # exit status for Ctrl-C, as in shells
SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = 5.0  # seconds until an uncaught interrupt is raised again
SOON = 0.05  # seconds until an interrupt at a bad moment is raised again
Handler = Callable[..., object]


def interrupt(*_: object) -> None:
    """Raise KeyboardInterrupt, and again every few seconds until it is caught.

    An exception raised within a finaliser or a library's callback is swallowed there.
    """
    call_later(interrupt, AGAIN)
    raise KeyboardInterrupt


def call_later(handler: Handler, seconds: float) -> None:
    """Call a signal's handler after so many seconds, where the system has interval timers."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def handle(handler: Handler, instead_of: tuple[object, ...] | None = None) -> dict[int, object]:
    """Install a handler as `handling` does, for good; return the replaced handlers by signal."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    replaced = {}
    for number in SIGNALS:
        current = signal.getsignal(number)
        is_ignored = (number, current) == (signal.SIGINT, signal.SIG_IGN)
        if current in instead_of if instead_of else not is_ignored:
            replaced[number] = current
            signal.signal(number, handler)
    return replaced


@contextmanager
def handling(handler: Handler, instead_of: tuple[object, ...] | None = None) -> Iterator[None]:
    """Handle SIGINT and SIGTERM by `handler`, if given only in place of those in `instead_of`.

    An ignored SIGINT, as of a background job, stays ignored. Does nothing outside the main thread,
    the only one that receives signals.
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
    """Cancel the repetition of an interrupt that was caught."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


def ignore_in_worker(*_: object) -> None:
    """Ignore Ctrl-C in a worker process, which its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
