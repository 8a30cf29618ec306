"""`bouquet run`: the main job as a simulation on this machine."""

import argparse
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy import settings
from deploy.flower import environment, program
from deploy.settings import Commands
from strategies import read_config

APP = Path(__file__).parents[1]
SIMULATION = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    # Or a run says nothing until it has ended: what is read here is no terminal.
    "PYTHONUNBUFFERED": "1",
}
NOISE = re.compile(r"\x1b\[\d+m(\((ClientAppActor|pid=)|INFO|WARNING)|^\((ClientAppActor|pid=)")


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
    flat = settings.located(settings.read(options.settings))
    read_config(flat)
    return simulate(options.nodes, options.cpus, options.gpus, options.directory.resolve(), flat)


def simulate(
    nodes: int, cpus: int, gpus: float, directory: Path, config: Mapping[str, Any], *, follow: bool = True
) -> int:
    """``flwr run`` on the local simulation: its noise goes to a log file, the run's own lines to the terminal too.

    Without ``follow`` they go to the log alone. Whoever interrupts it stops the run, which Flower would go on with.

    Returns 0 only if Flower says that the run completed, which the exit code of ``flwr run`` does not tell.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "flower.log"
    own = environment(SIMULATION | _own_superlink())
    overrides = [f'run-directory="{directory}"', f"min-nodes={nodes}", *settings.write(config)]
    federation = f"num-supernodes={nodes} client-resources-num-cpus={cpus} client-resources-num-gpus={gpus}"
    command = [program("flwr"), "run", str(APP), "local", "--stream", "--federation-config", federation]
    run_id, failed = "", False
    with (
        log.open("w") as everything,
        subprocess.Popen(
            [*command, "--run-config", " ".join(overrides)],
            env=own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        if follow:
            print("starting Flower's simulation", flush=True)
        try:
            for line in process.stdout or ():
                everything.write(line)
                run_id = run_id or "".join(re.findall(r"started run (\d+)", line))
                failed = failed or "Traceback (most recent call last)" in line or "ERROR" in line
                if follow and (not run_id or not (failed or NOISE.search(line))):
                    print(line, end="", flush=True)
        except KeyboardInterrupt:
            if run_id:
                stop = [program("flwr"), "stop", run_id, "local"]
                subprocess.run(stop, env=own, capture_output=True, check=False)
            raise
    if not run_id or _status(run_id, own) != "finished:completed":
        print(f"bouquet: the run did not complete; everything Flower said is in {log}", file=sys.stderr)
        return 1
    return 0


def _own_superlink() -> dict[str, str]:
    """Where Flower keeps this checkout's local SuperLink.

    `flwr run` leaves one running for the next time, with the packages of the environment that started it; another
    checkout's would run this app with them. Two that share a folder share a database, and end each other's runs.
    """
    checkout = zlib.crc32(str(APP).encode())
    port = 20000 + 2 * (checkout % 5000)
    return {
        "FLWR_HOME": str(Path(sys.prefix) / "flower" / f"{checkout:08x}"),
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
