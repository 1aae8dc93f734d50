"""How a command ends: one line on stderr, and a status for every way."""

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import jax

from jaxdl.errors import RunError, UserError
from jaxdl.training import Interrupted

BAD_INPUT, FAILURE = 2, 1


@contextlib.contextmanager
def exit_statuses() -> Iterator[None]:
    """One clear line on stderr and a status for every way to end."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise Interrupted(
            f"{signal.Signals(number).name}: stopped; what was saved stands, and the same command goes on from there", number
        )

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except UserError as error:
        _end(f"error: {error}", BAD_INPUT)
    except RunError as error:
        _end(f"error: {error}", FAILURE)
    except Interrupted as interrupted:
        _end(str(interrupted), 128 + interrupted.signal_number)
    except KeyboardInterrupt:
        _end("interrupted; what was saved stands, and the same command goes on from there", 128 + signal.SIGINT)
    except Exception as error:
        if jax.process_count() > 1 and _is_of_the_backend(error):
            _end(
                f"error: another process of this run ended or cannot be reached ({str(error).splitlines()[0][:200]}); "
                "the last whole checkpoint stands: look at the other processes' messages, then start all of them again with the same command",
                FAILURE,
            )
        if not _disk_is_full(error):
            raise
        _end(
            "error: no space is left on the disk; the last whole checkpoint stands: free some space, then give the same command",
            FAILURE,
        )


def _end(line: str, status: int) -> NoReturn:
    """Ends the process. One of several does not wait for the others: they may wait for it, and learn at once that it is gone."""
    if jax.distributed.is_initialized():
        end_at_once(line, status)
    print(" ".join(line.split()), file=sys.stderr)
    raise SystemExit(status)


def end_at_once(line: str, status: int) -> NoReturn:
    """Says a line on stderr and ends the process with a status, waiting neither for its threads nor for other processes."""
    print(" ".join(line.split()), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


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
