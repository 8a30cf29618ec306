"""The ``bouquet`` command.

bouquet run                                           the main job: four simulated nodes on this machine
bouquet run --nodes 2 num-server-rounds=1 rule.name=fedex-lora
bouquet plan --examples 5000,1200 privacy.mode=example train.weighting=uniform
bouquet ledger show                                   what this node's data has cost
"""

import argparse
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from common.error import BouquetError
from deploy import ledger, plan, settings
from strategies import RULES, read_config

APP = Path(__file__).parents[1]
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
NOISE = re.compile(r"\x1b\[\d+m(\((ClientAppActor|pid=)|INFO|WARNING)|^\((ClientAppActor|pid=)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="bouquet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
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
    rules = commands.add_parser("rules", help="list the aggregation rules", description="Example: bouquet rules")
    rules.set_defaults(work=_rules)
    plan.add_to(commands)
    ledger.add_to(commands)
    options = parser.parse_args(arguments)
    try:
        return int(options.work(options))
    except BouquetError as error:
        print(f"bouquet: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    flat = settings.read(options.settings)
    read_config(flat)
    return simulate(options.nodes, options.cpus, options.gpus, options.directory.resolve(), settings.write(flat))


def _rules(_: argparse.Namespace) -> int:
    print(rules_table())
    return 0


def simulate(nodes: int, cpus: int, gpus: float, directory: Path, overrides: Sequence[str]) -> int:
    """``flwr run`` on the local simulation: its noise goes to a log file, the run's own lines to the terminal.

    Returns 0 only if Flower says that the run completed, which the exit code of ``flwr run`` does not tell.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "flower.log"
    flwr = Path(sys.executable).with_name("flwr")
    # Flower finds its own programs on the PATH.
    environment = {
        **os.environ,
        **QUIET,
        **_own_superlink(),
        "PATH": f"{flwr.parent}{os.pathsep}{os.environ['PATH']}",
    }
    overrides = [f'run-directory="{directory}"', f"min-nodes={nodes}", *overrides]
    federation = f"num-supernodes={nodes} client-resources-num-cpus={cpus} client-resources-num-gpus={gpus}"
    command = [str(flwr), "run", str(APP), "local", "--stream", "--federation-config", federation]
    run_id, failed = "", False
    with (
        log.open("w") as everything,
        subprocess.Popen(
            [*command, "--run-config", " ".join(overrides)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        print("starting Flower's simulation", flush=True)
        for line in process.stdout or ():
            everything.write(line)
            run_id = run_id or "".join(re.findall(r"started run (\d+)", line))
            failed = failed or "Traceback (most recent call last)" in line or "ERROR" in line
            if not run_id or not (failed or NOISE.search(line)):
                print(line, end="", flush=True)
    if not run_id or _status(flwr, run_id, environment) != "finished:completed":
        print(f"bouquet: the run did not complete; everything Flower said is in {log}", file=sys.stderr)
        return 1
    return 0


def _own_superlink() -> dict[str, str]:
    """Where Flower keeps this checkout's local SuperLink.

    `flwr run` leaves one running for the next time, with the packages of the environment that started it; another
    checkout's would run this app with them.
    """
    port = 20000 + 2 * (zlib.crc32(str(APP).encode()) % 5000)
    return {
        "FLWR_HOME": str(Path(sys.prefix) / "flower"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_LOCAL_CONTROL_API_PORT": str(port + 1),
    }


def rules_table() -> str:
    """Every rule and its properties, as a Markdown table."""
    yes = {True: "yes", False: "no"}
    titles = ("rule", "exact", "linear", "mixed ranks", "privacy", "bytes up", "bytes down", "paper")
    rows = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for name, rule in RULES.items():
        privacy = "example, local, central" if rule.linear else "example, local"
        costs = (f"`{rule.bytes_up}`", f"`{rule.bytes_down}`")
        facts = (f"`{name}`", yes[rule.exact], yes[rule.linear], yes[rule.mixed_ranks], privacy, *costs, rule.paper)
        rows.append(f"| {' | '.join(facts)} |")
    return "\n".join(rows)


def _status(flwr: Path, run_id: str, environment: dict[str, str]) -> str:
    listing = subprocess.run(
        [str(flwr), "ls", "local", "--run-id", run_id, "--format", "json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return str(json.loads(listing.stdout)["runs"][0]["status"])
    except (json.JSONDecodeError, LookupError):
        return "unknown"
