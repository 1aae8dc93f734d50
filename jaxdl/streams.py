"""The standard streams of a command, which must not end it: a pipe that nobody reads any more, a terminal that knows ASCII alone, none at all."""

import contextlib
import io
import os
import sys


class Lasting(io.TextIOWrapper):
    """A stream of text whose reader may go: what is written then is dropped. What its encoding lacks is replaced, and every line is sent at once."""

    def __init__(self, descriptor: int, encoding: str):
        super().__init__(os.fdopen(descriptor, "wb", closefd=False), encoding, errors="replace", line_buffering=True)

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Sends what is left, and all that follows, nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        with contextlib.suppress(OSError):
            super().flush()


def mend_streams() -> None:
    """Makes stdout and stderr streams that last, where they are the process' own.

    Those that are closed are opened to nowhere: else the next file that is opened takes their place, and what libraries write to them goes into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # The lowest that is free, which is this one.
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        given = getattr(sys, name)
        if given is None or given is getattr(sys, f"__{name}__"):
            if given is not None:
                with contextlib.suppress(OSError):
                    given.flush()
            setattr(sys, name, Lasting(descriptor, given.encoding if given is not None else "utf-8"))
