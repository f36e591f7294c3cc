"""The command `autorefiner`: imports what is heavy only once a signal can no longer give a
traceback."""

import os
import sys
from contextlib import suppress

from .refiner.stopping import INTERRUPTED, handle


def main() -> int:
    """Run the command line. A signal before it starts, or after it ended, ends the process at
    once."""
    handle(leave)
    from .nodes.cli import main as run
    from .refiner.training.distributed import end_process, is_one_of_several

    status = run()
    if is_one_of_several():
        end_process(status)
    with suppress(OSError):  # a closed pipe is reported at the exit
        sys.stdout.flush()
    return status


def leave(*_: object) -> None:
    """End the process: nothing has been written yet, or all of it has."""
    os.write(2, b"stopped\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
