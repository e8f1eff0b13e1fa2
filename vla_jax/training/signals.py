"""Ctrl-C and SIGTERM as a request that the loop answers between two steps."""

import contextlib
import signal
import sys
from collections.abc import Iterator


class StopRequest:
    """Catches SIGINT and SIGTERM while it is entered. The first one asks for a stop; a second Ctrl-C stops at once."""

    def __init__(self):
        self.requested = False
        self.status = 0  # with which to leave: 0 after SIGTERM, which is how clusters take a machine back
        self._interruptible = False
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(
                ValueError
            ):  # only the main thread may catch signals; elsewhere the caller stops us
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame) -> None:
        self.status = 130 if number == signal.SIGINT else self.status
        if self._interruptible or (self.requested and number == signal.SIGINT):
            self.requested = True
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step, to save (Ctrl-C again stops at once)", file=sys.stderr)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, even the first signal raises KeyboardInterrupt: for long work that changes no state."""
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False
