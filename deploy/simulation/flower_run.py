"""``flwr run`` on Flower's own simulation, followed to its end."""

import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.record.directory import SAID, TOO_FEW
from common.record.run import Run
from deploy import settings
from deploy.flower import APP, SIMULATION, app_alone, environment, program
from deploy.simulation import steps
from deploy.simulation.attempt import Attempt, attempted

PAUSE_SECONDS = 0.2


def simulate(nodes: int, cpus: int, gpus: float, directory: Path, config: Mapping[str, Any]) -> int:
    """``flwr run`` on the local simulation. What the run says is followed.

    What Flower says goes to a log in the run's directory, and nothing is read from it but a run's id and, where a run
    had no record yet, the words of its error. Whoever interrupts it stops the run, which Flower would go on with.

    Returns an exit code: not 0 unless Flower says that the run completed, which the exit code of ``flwr run`` does not
    tell.
    """
    own = environment(SIMULATION | _own_superlink())
    federation = f"num-supernodes={nodes} client-resources-num-cpus={cpus} client-resources-num-gpus={gpus}"
    with attempted(nodes, directory, config) as attempt, app_alone() as app, attempt.log.open("w") as everything:
        overrides = " ".join(settings.write(attempt.config))
        command = ["local", "--stream", "--federation-config", federation, "--run-config", overrides]
        said, log = attempt.folder / SAID, attempt.log
        before = read = said.stat().st_size if said.exists() else 0
        with (
            subprocess.Popen(
                [program("flwr"), "run", str(app), *command], env=own, stdout=everything, stderr=subprocess.STDOUT
            ) as process,
            steps.shown(attempt.folder.name),
        ):
            print("starting Flower's simulation", flush=True)
            try:
                ended = False
                while not ended:
                    ended = _ended(process)
                    read = _told(said, read)
            except (KeyboardInterrupt, BrokenPipeError):
                if run_id := _run_id(log):
                    stop = [program("flwr"), "stop", run_id, "local"]
                    subprocess.run(stop, env=own, capture_output=True, check=False)
                raise
        if _status(_run_id(log), own) == "finished:completed":
            attempt.tell_next()
            return 0
        return _explained(attempt, Run.read(attempt.folder) if read > before else None)


def _explained(attempt: Attempt, run: Run | None) -> int:
    """Say why a run did not complete, as its record has it or else Flower's log; its exit code."""
    stopped = run.stopped if run else None
    reason = (stopped.reason if stopped else "") or _last_words(attempt.log)
    return attempt.tell_failed(reason, too_few=stopped is not None and stopped.ended == TOO_FEW)


def _ended(process: "subprocess.Popen[bytes]") -> bool:
    """Whether a process has ended, after a moment's wait for it."""
    try:
        process.wait(PAUSE_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def _told(said: Path, read: int) -> int:
    """Print what a run has said since ``read`` bytes of it; returns how many bytes there are now."""
    if not said.exists():
        return read
    with said.open("rb") as file:
        file.seek(read)
        new = file.read()
    whole = new[: new.rfind(b"\n") + 1]
    print(whole.decode(errors="replace"), end="", flush=True)
    return read + len(whole)


def _run_id(log: Path) -> str:
    """Flower's id of the run, from the first line that names one; empty where it was never started."""
    found = re.search(r"started run (\d+)", log.read_text(errors="replace"))
    return found.group(1) if found else ""


def _last_words(log: Path) -> str:
    """Why a run ended that had no record yet: its own message, or the last lines of the log without their frame."""
    lines = [line.strip("│╭╮╰╯─ ") for line in log.read_text(errors="replace").splitlines()]
    ours = [line.removeprefix("bouquet: ") for line in lines if line.startswith("bouquet: ")]
    return ours[-1] if ours else " ".join(line for line in lines[-8:] if line) or "Flower said nothing"


def _own_superlink() -> dict[str, str]:
    """Where Flower keeps this checkout's local SuperLink.

    `flwr run` leaves one running for the next time, with the packages of the environment that started it; another
    checkout's would run this app with them. Two that share a folder share a database, and end each other's runs.
    """
    home = Path(sys.prefix) / "flower"
    if not os.access(home if home.exists() else home.parent, os.W_OK):  # somebody else's environment
        home = Path.home() / ".bouquet" / "flower"
    checkout = zlib.crc32(f"{home} {APP}".encode())
    port = 20000 + 2 * (checkout % 5000)
    return {
        "FLWR_HOME": str(home / f"{checkout:08x}"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_LOCAL_CONTROL_API_PORT": str(port + 1),
    }


def _status(run_id: str, own: dict[str, str]) -> str:
    listing = subprocess.run(
        [program("flwr"), "ls", "local", "--run-id", run_id, "--format", "json"],
        env=own,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return str(json.loads(listing.stdout)["runs"][0]["status"])
    except (json.JSONDecodeError, LookupError):
        return "unknown"
