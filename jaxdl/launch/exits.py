"""How a command ends: one line on stderr, and a status for every way."""

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

import jax

from jaxdl import signals
from jaxdl.errors import RunError, UserError
from jaxdl.signals import Interrupted, end_at_once
from jaxdl.streams import mend_streams

BAD_INPUT, FAILURE = 2, 1

_STANDS = "the last whole checkpoint stands"
_NO_SPACE = f"error: no space is left on the disk; {_STANDS}: free some space, then give the same command"


@contextlib.contextmanager
def exit_statuses() -> Iterator[None]:
    """One clear line on stderr and a status for every way to end."""
    try:
        with signals.listening():
            yield
        signals.conclude(0)
    except UserError as error:
        _end(f"error: {error}", BAD_INPUT)
    except RunError as error:
        _end(_NO_SPACE if _disk_is_full(error) else f"error: {error}", FAILURE)
    except Interrupted as interrupted:
        _end(str(interrupted), 128 + interrupted.signal_number)
    except KeyboardInterrupt:
        _end(f"interrupted; {signals.STANDS}", 128 + signal.SIGINT)
    except Exception as error:
        if jax.process_count() > 1 and _is_of_the_backend(error):
            _end(
                f"error: another process of this run ended or cannot be reached ({_reason(error)}); "
                f"{_STANDS}: look at the other processes' messages, then start all of them again with the same command",
                FAILURE,
            )
        if _disk_is_full(error):
            _end(_NO_SPACE, FAILURE)
        if _memory_is_full(error):
            _end(
                f"error: the memory of {_device()} is full ({_reason(error)}); {_STANDS}: give a smaller --batch-size, cut the batch into parts "
                "(--accumulate), compute activations again (--remat, where the experiment has it), or take a smaller model",
                FAILURE,
            )
        raise


def own_process() -> None:
    """Makes this process the command's own: its streams last, and its signals are watched. To be called before anything is read or written."""
    mend_streams()
    signals.watch()


def _end(line: str, status: int) -> NoReturn:
    """Ends the process. One that is the command's own does not wait for its threads, as those of Orbax wait for minutes after a failure, and one of several not for the others: they may wait for it, and learn at once that it is gone."""
    signals.conclude(status)
    if signals.watched() or jax.distributed.is_initialized():
        end_at_once(line, status)
    if sys.stderr is not None:
        print(" ".join(line.split()), file=sys.stderr)
    raise SystemExit(status)


def _is_of_the_backend(error: Exception) -> bool:
    """Whether it is a failure of XLA or of what carries data between processes, which jax lets through as a `ValueError` that begins with a status."""
    return isinstance(error, jax.errors.JaxRuntimeError) or re.match(r"[A-Z_]+: ", str(error)) is not None


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is ENOSPC; TensorStore says so in words only."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _memory_is_full(error: BaseException) -> bool:
    """Whether the memory of a device or of the host was too small. XLA says both with one status, and the disk's end too."""
    words = str(error)
    return isinstance(error, MemoryError) or (
        "RESOURCE_EXHAUSTED" in words and re.search("memory|allocat", words, re.I) is not None
    )


def _device() -> str:
    return "this machine" if jax.default_backend() == "cpu" else f"the device ({jax.devices()[0].device_kind})"


def _reason(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
