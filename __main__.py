"""The command `autorefiner`: imports what is heavy only once a signal can no longer give a traceback."""

import os
import sys

from .refiner.stopping import INTERRUPTED, handling


def main() -> int:
    """Run the command line. A signal before it starts, or after it ended, ends the process at once."""
    with handling(leave):
        from .nodes.cli import main as run

        return run()


def leave(*_: object) -> None:
    """End the process: nothing has been written yet, or all of it has."""
    os.write(2, b"stopped\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
