"""`bouquet run`: the main job as a simulation on this machine."""

import argparse
import fcntl
import json
import os
import random
import re
import shlex
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.error import BouquetError
from common.record.directory import ADAPTER, SAID, TOO_FEW, make_folder, name_of_now
from common.record.run import Run
from deploy import settings
from deploy.flower import APP, app_alone, environment, program
from deploy.settings import Commands
from deploy.settle import settled
from strategies import Recipe

SIMULATION = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
FLOWERS_LOG = "flower.log"
PAUSE_SECONDS = 0.2
# The exit codes of a run, beside 0 for one that went as it was asked.
FAILED, TOO_FEW_NODES = 1, 3


def add_to(commands: Commands) -> None:
    """Add the subcommand."""
    run = commands.add_parser(
        "run",
        help="run a simulation on this machine and follow it",
        description="Example: bouquet run --nodes 3 rule.name=ffa-lora train.learning-rate=0.01",
    )
    run.add_argument("--nodes", type=int, default=4, help="simulated nodes (default 4)")
    run.add_argument("--cpus", type=int, default=1, help="CPU cores a node (default 1)")
    run.add_argument("--gpus", type=float, default=0.0, help="share of a GPU a node (default 0)")
    run.add_argument("--directory", type=Path, default=Path("runs"), help="where run directories go (default runs)")
    run.add_argument("settings", nargs="*", metavar="key=value", help="run config, or a TOML file of it")
    run.set_defaults(work=_run)


def _run(options: argparse.Namespace) -> int:
    for name, got, least in (("nodes", options.nodes, 1), ("cpus", options.cpus, 1), ("gpus", options.gpus, 0)):
        if not got >= least:
            raise BouquetError(
                "an option that cannot be used", where=f"--{name}", expected=f"{least} or more", got=f"{got:g}"
            )
    flat, said = settled(settings.located(settings.read(options.settings)), options.nodes)
    for line in said:
        print(line)
    Recipe.read(flat)
    return simulate(options.nodes, options.cpus, options.gpus, options.directory.resolve(), flat)


def simulate(
    nodes: int, cpus: int, gpus: float, directory: Path, config: Mapping[str, Any], *, follow: bool = True
) -> int:
    """``flwr run`` on the local simulation. What the run says is followed, unless ``follow`` is false.

    What Flower says goes to a log in the run's directory, and nothing is read from it but a run's id and, where a run
    had no record yet, the words of its error. Whoever interrupts it stops the run, which Flower would go on with.

    Returns an exit code: :data:`FAILED` unless Flower says that the run completed, which the exit code of ``flwr run``
    does not tell; :data:`TOO_FEW_NODES` for a run that ended early because too few nodes were there.
    """
    name = str(config.get("run-name") or name_of_now(random.SystemRandom().randrange(10**6)))
    make_folder(folder := directory / name, resume=bool(config.get("resume")))
    log, own = folder / FLOWERS_LOG, environment(SIMULATION | _own_superlink())
    overrides = settings.write({"min-nodes": nodes, **config, "run-directory": str(directory), "run-name": name})
    federation = f"num-supernodes={nodes} client-resources-num-cpus={cpus} client-resources-num-gpus={gpus}"
    command = ["local", "--stream", "--federation-config", federation, "--run-config", " ".join(overrides)]
    said = folder / SAID
    before = read = said.stat().st_size if said.exists() else 0
    with (
        _alone(log),
        app_alone() as app,
        log.open("w") as everything,
        subprocess.Popen(
            [program("flwr"), "run", str(app), *command], env=own, stdout=everything, stderr=subprocess.STDOUT
        ) as process,
    ):
        if follow:
            print("starting Flower's simulation", flush=True)
        try:
            ended = False
            while not ended:
                ended = _ended(process)
                read = _told(said, read) if follow else read
        except (KeyboardInterrupt, BrokenPipeError):
            if run_id := _run_id(log):
                stop = [program("flwr"), "stop", run_id, "local"]
                subprocess.run(stop, env=own, capture_output=True, check=False)
            raise
    if _status(_run_id(log), own) == "finished:completed":
        if follow and (folder / ADAPTER).is_dir():
            print(f"next: bouquet chat {shlex.quote(str(folder))}")
        return 0
    return _explained(Run.read(folder) if said.exists() and said.stat().st_size > before else None, log)


def _explained(run: Run | None, log: Path) -> int:
    """Say why a run did not complete, as its record has it or else Flower's log; its exit code."""
    stopped = run.stopped if run else None
    reason = (stopped.reason if stopped else "") or _last_words(log)
    print(f"bouquet: the run did not complete: {reason}\nEverything Flower said is in {log}.", file=sys.stderr)
    return TOO_FEW_NODES if stopped and stopped.ended == TOO_FEW else FAILED


@contextmanager
def _alone(log: Path) -> Iterator[None]:
    """Hold a run's log, from before there is a record that could be held. Raises :class:`BouquetError` if another does.

    No child process inherits the lock: Flower leaves one behind.
    """
    with log.open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            cure = "Wait for it or stop it, or choose another run-name."
            raise BouquetError("this run is under way", where=str(log.parent), cure=cure) from error
        yield


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
