"""Requests to stop. A signal becomes a flag that the phases of a run look at, never an exception out of a handler, which may fall where nothing can be raised and be lost."""

import atexit
import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a request to end, and a terminal that is gone."""

PATIENCE = 2.0
"""Seconds in which a signal is to be answered once all is saved, or once it has come again: wrappers and terminals send it twice."""

STANDS = "what was saved stands, and the same command goes on from there"


class Interrupted(KeyboardInterrupt):
    """A signal ended the run after everything was saved."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


_received: list[int] = []
_listening = False
_owner: int | None = None
"""The process that `watch` was called in."""
_grace = 0.0
"""Seconds that a signal to a command waits for who looks at the flag."""
_status: int | None = None
"""What the command ends with, once that is known."""


def received() -> int | None:
    """The first signal to stop that has come, if one has."""
    return _received[0] if _received else None


def look() -> None:
    """Raises `Interrupted` if a signal to stop has come. To be called between the parts of whatever takes long."""
    if _received:
        raise Interrupted(f"{signal.Signals(_received[0]).name}: stopped; {STANDS}", _received[0])


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Within the block signals to stop are flags; one that nobody has looked at is answered at its end.

    In a program that is not a command's own (`watch`) the signals' handlers come back afterwards, and meanwhile at a second signal. Outside of the main thread, and within another such block, there is nothing to do.
    """
    global _listening
    if _listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    _received.clear()
    before = {number: signal.getsignal(number) for number in STOPPING}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        restore()

    if not watched():
        _handle_with(handle)
    _listening = True
    try:
        yield
        look()
    finally:
        _listening = False
        _received.clear()
        if not watched():
            restore()


def watched() -> bool:
    """Whether this process is a command's own, whose signals are watched."""
    return _owner == os.getpid()


def watch() -> None:
    """Watches the signals of a process that is a command's own, from here to its end.

    Until there is something to save (`defer`), and when the command has ended, a signal ends the process at once. In between the first one is a flag; another one ends the process at once, the same one `PATIENCE` seconds after the first, whatever the main thread is at: a thread of its own reads them, as Python's handlers wait for the main thread, which may be compiling. The status is 128 + the number of the signal. To be called in the main thread, as early as possible.
    """
    global _owner
    if watched() or threading.current_thread() is not threading.main_thread():
        return
    _owner = os.getpid()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _handle_with(_receive)
    os.register_at_fork(after_in_child=_forget)
    atexit.register(_leave)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()


def defer(seconds: float = math.inf) -> None:
    """From here on a signal is a flag, and ends the command at once only if nobody has answered it in so many seconds."""
    global _grace
    if watched() and threading.current_thread() is threading.main_thread():
        _grace = seconds
        _handle_with(_receive)  # Again: jax takes SIGTERM for itself when it joins other processes.


def conclude(status: int) -> None:
    """The command ends with this status, and everything is closed: a signal ends the process at once again."""
    global _grace, _status
    _grace, _status = 0.0, status


def end_at_once(line: str, status: int) -> NoReturn:
    """Says a line on stderr and ends the process with a status, waiting for nothing. Files are written whole or not at all, so none is damaged."""
    with contextlib.suppress(OSError):
        os.write(2, (" ".join(line.split()) + "\n").encode(getattr(sys.stderr, "encoding", None) or "utf-8", "replace"))
    os._exit(status)


def _receive(number: int, frame: FrameType | None = None) -> None:
    _received.append(number)


def _handle_with(handler: signal.Handlers | object) -> None:
    for number in STOPPING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # As nohup has it.
            signal.signal(number, handler)  # type: ignore[arg-type]


def _leave() -> None:
    """The last of what is done at exit, as it was the first to be registered: while Python then takes itself apart, signals would be lost."""
    if watched() and _status is not None:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(_status)


def _forget() -> None:
    """A process that is forked is nobody's command, and its signals are not its parent's."""
    if signal.getsignal(signal.SIGTERM) is _receive:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)


def _watch(reader: int) -> None:
    """Answers the signals whose numbers come through a pipe."""
    first, came, until = 0, 0.0, math.inf
    while True:
        seconds = until - time.monotonic()
        if not select.select([reader], [], [], None if math.isinf(seconds) else max(seconds, 0.0))[0]:
            end_at_once(f"{signal.Signals(first).name}: ended at once; {STANDS}", 128 + first)
        for number in filter(STOPPING.__contains__, os.read(reader, 64)):
            if _status:
                os._exit(_status)  # The line that belongs to it is said.
            if not first:
                _receive(number)
                first, came = number, time.monotonic()
                until = came + _grace
                if _grace and os.isatty(2):
                    os.write(2, b"\nstopping as soon as all is saved; once more to stop at once\n")
            elif number == first:
                until = min(until, came + PATIENCE)
            else:
                end_at_once(f"{signal.Signals(number).name}: ended at once; {STANDS}", 128 + number)
