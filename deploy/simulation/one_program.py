"""A simulation in one program: the ServerApp here, the nodes in worker processes."""

import os
import secrets
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from common.adapter.threads import one_thread
from common.error import QuorumError
from deploy.simulation import steps
from deploy.simulation.attempt import attempted
from deploy.simulation.grid import COORDINATOR, WorkersGrid, simulated_nodes
from deploy.simulation.workers import Workers


def simulate(workers: Workers, nodes: int, directory: Path, config: Mapping[str, Any], *, follow: bool = True) -> int:
    """One run, whose nodes the ``workers`` answer for. What it says is followed, unless ``follow`` is false.

    What libraries and nodes say goes to a log in the run's directory. Returns an exit code, 0 for a run that completed.
    """
    with attempted(nodes, directory, config) as attempt, attempt.log.open("a") as log:
        log.truncate(0)
        if follow:
            print("starting the processes of the nodes", flush=True)
        workers.start(attempt.log)
        run_id = secrets.randbits(63)
        contexts = simulated_nodes(run_id, nodes, attempt.config)
        own = Context(run_id, COORDINATOR, {}, RecordDict(), dict(attempt.config))
        try:
            with ExitStack() as stack:
                stack.callback(workers.drop)
                stack.enter_context(_errors_to(log))
                stack.enter_context(steps.shown(attempt.folder.name) if follow else redirect_stdout(log))
                stack.enter_context(one_thread())
                from server_app.run import conduct  # takes seconds to import, as do the workers at the same time

                conduct(WorkersGrid(workers, contexts, run_id, attempt.log), own)
        except Exception as error:  # a boundary: a run that fails ends neither a comparison nor this command unheard
            traceback.print_exception(error, file=log)
            return attempt.tell_failed(str(error) or type(error).__name__, too_few=isinstance(error, QuorumError))
        if follow:
            attempt.tell_next()
        return 0


@contextmanager
def _errors_to(log: TextIOWrapper) -> Iterator[None]:
    """Have in the log what is written to this process's standard error, by whatever library and in whatever way."""
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)
