"""Real Flower processes on this machine: a deployment over gRPC gives the adapter that the simulation gives."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

APP = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SETTINGS = "num-server-rounds=1 data.limit=40 train.steps=3 train.batch-size=4 evaluation.limit=8 round.deadline=240.0"

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# The SuperLink that `flwr run` starts for a simulation: not the user's own, where one is running.
LOCAL_PORTS = {name: str(free_port()) for name in ("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT")}


def environment(home: Path) -> dict[str, str]:
    return LOCAL_PORTS | {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def started(command: list[str], home: Path) -> Iterator[subprocess.Popen]:
    """A Flower process with its children in a group of its own, stopped at the end."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment(home), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def flwr_run(home: Path, *arguments: str, directory: Path, name: str) -> dict:
    overrides = f'{SETTINGS} run-directory="{directory}" run-name="{name}" min-nodes=2'
    command = [str(BIN / "flwr"), "run", str(APP), *arguments, "--stream", "--run-config", overrides]
    finished = subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=280)
    summary = directory / name / "summary.json"
    assert summary.exists(), finished.stdout[-4000:] + finished.stderr[-2000:]
    return json.loads(summary.read_text())


def stop_local_superlink(home: Path) -> None:
    """The SuperLink that `flwr run` starts for a simulation outlives it."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            ours = f"FLWR_HOME={home}".encode() in environ.read_bytes().split(b"\0")
        except (OSError, PermissionError):
            continue
        if ours:
            os.kill(int(environ.parent.name), signal.SIGTERM)


def test_a_deployment_over_grpc_gives_the_simulations_adapter(tmp_path):
    fleet, control, runs = free_port(), free_port(), tmp_path / "runs"
    home = tmp_path / "user"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "deployed"\n[superlink.deployed]\naddress = "127.0.0.1:{control}"\ninsecure = true\n'
        '[superlink.local]\naddress = ":local:"\n'
    )
    with ExitStack() as processes:
        link = [str(BIN / "flower-superlink"), "--insecure", "--port", str(control)]
        processes.enter_context(started([*link, "--fleet-api-address", f"127.0.0.1:{fleet}"], tmp_path / "superlink"))
        wait_for_port(fleet)
        for node in range(2):
            processes.enter_context(
                started(
                    [
                        str(BIN / "flower-supernode"),
                        "--insecure",
                        "--superlink",
                        f"127.0.0.1:{fleet}",
                        "--port",
                        str(free_port()),
                        "--node-config",
                        f"partition-id={node} num-partitions=2",
                    ],
                    tmp_path / f"node{node}",
                )
            )
        deployed = flwr_run(home, "deployed", directory=runs, name="deployed")
    try:
        simulated = flwr_run(home, "local", "--federation-config", "num-supernodes=2", directory=runs, name="simulated")
    finally:
        stop_local_superlink(home)
    assert deployed["adapter_digest"] == simulated["adapter_digest"]
    assert deployed["after"]["all"] < deployed["before"]["all"]
    assert deployed["bytes_up"] == pytest.approx(simulated["bytes_up"], abs=100)


def wait_for_port(port: int, limit: float = 60.0) -> None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"nothing listens on port {port}")
