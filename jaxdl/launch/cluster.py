"""The processes of one run: how they find each other."""

import dataclasses
import threading
from typing import Annotated

import jax
from annotated_types import Ge

from jaxdl.errors import UserError
from jaxdl.launch.config import check
from jaxdl.launch.exits import BAD_INPUT, end_at_once


@dataclasses.dataclass(frozen=True)
class Processes:
    """How the processes of one run find each other; each is started with the same flags."""

    distributed: bool = False
    """Join the other processes of this run. Under SLURM, Open MPI, Kubernetes and on TPU pods jax finds them; elsewhere say where they are."""
    coordinator: str = ""
    """HOST:PORT at which the first process can be reached."""
    num_processes: Annotated[int, Ge(0)] = 0
    """How many processes there are. 0: as jax detects."""
    process_id: Annotated[int, Ge(-1)] = -1
    """Which of them this one is, from 0. -1: as jax detects."""
    patience: Annotated[int, Ge(1)] = 60
    """Seconds to wait for processes that do not answer, at the start and later."""

    def __post_init__(self) -> None:
        check(self)
        stated = (bool(self.coordinator), self.num_processes > 0, self.process_id >= 0)
        if any(stated) and not self.distributed:
            raise UserError("--coordinator, --num-processes and --process-id are for --distributed runs: give that flag too")
        if any(stated) and not all(stated):
            raise UserError(
                "--coordinator, --num-processes and --process-id belong together: give all three, or none where jax detects them"
            )
        if all(stated) and self.process_id >= self.num_processes:
            raise UserError(f"--process-id {self.process_id} of --num-processes {self.num_processes}: they are numbered from 0")


def join(processes: Processes) -> None:
    """Makes this one of several processes. Raises `UserError` if jax does not find out where the others are; ends with a line if they do not come in time."""
    where = (
        f"at {processes.coordinator}, as process {processes.process_id} of {processes.num_processes}"
        if processes.coordinator
        else "where jax detected them"
    )
    # jax ends the process with a stack trace of C++ when time is up, so it is given more of it than the others have.
    timer = threading.Timer(
        processes.patience,
        end_at_once,
        [
            f"error: waited {processes.patience} s for the other processes {where}, and not all came: start each with the same flags but for --process-id, "
            "and see that this machine reaches that address (--patience waits longer)",
            BAD_INPUT,
        ],
    )
    stated = dict(
        coordinator_address=processes.coordinator, num_processes=processes.num_processes, process_id=processes.process_id
    )
    timer.start()
    # An error in the thread that calls would end the process by SIGABRT when another one is gone.
    jax.config.update("jax_cpu_enable_async_dispatch", True)
    try:
        jax.distributed.initialize(
            **stated if processes.coordinator else {},
            initialization_timeout=processes.patience + 60,
            heartbeat_timeout_seconds=processes.patience,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"jax does not find the other processes here ({error}): give --coordinator, --num-processes and --process-id"
        ) from None
    finally:
        timer.cancel()
