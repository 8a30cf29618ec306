"""Real Flower processes on this machine, as `bouquet site` starts them: a SuperLink, its SuperExec, SuperNodes."""

import json
import os
import pwd
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from client_app import worker
from deploy.bundles import bundle
from deploy.command import main
from deploy.flower import SIMULATION, app_alone, environment, program
from tests.support.ports import free_port, free_ports, listens

CORES = os.cpu_count() or 1
"""All of them for each simulated node make one process of all nodes, which imports torch once."""
# For whom something is installed: whoever runs the tests, or where that is root, a user that may do nothing.
UNPRIVILEGED = pwd.getpwuid(os.getuid() or pwd.getpwnam("daemon").pw_uid).pw_name


# The SuperLink that `flwr run` starts for a simulation: not the user's own, where one is running.
LOCAL_PORTS = {name: str(free_port()) for name in ("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT")}


def quiet(**changes: str) -> dict[str, str]:
    return environment(SIMULATION | LOCAL_PORTS | {"HF_HUB_OFFLINE": "1"} | changes)


Bare = Callable[[Path], tuple[list[str], dict[str, str]]]


class Process:
    """A program with its children in a session of its own."""

    def __init__(self, command: list[str], log: Path, **changes: str) -> None:
        self.command, self.log, self.changes = command, log, changes
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.popen = subprocess.Popen(
                self.command, env=quiet(**self.changes), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def kill(self) -> None:
        """kill -9, children too."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(10)

    def stop(self) -> None:
        """SIGTERM, and kill -9 for what is left after 30 s."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(30)
        self.kill()


class Wire:
    """A TCP relay that counts what passes each way, and can be slowed down or cut."""

    def __init__(self, port: int, target: int) -> None:
        self.up = self.down = 0
        self.bytes_per_second = 0.0
        self._target, self._links = target, list[socket.socket]()
        self._open = threading.Event()
        self._open.set()
        self._server = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break every connection and refuse new ones."""
        self._open.clear()
        for link in self._links:
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        self._links.clear()

    def mend(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._server.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            try:
                if not self._open.is_set():
                    raise ConnectionRefusedError
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            self._links += [near, far]
            for source, sink, way in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._relay, args=(source, sink, way), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with source:
            with suppress(OSError):
                while data := source.recv(65536):
                    if self.bytes_per_second:
                        time.sleep(len(data) / self.bytes_per_second)
                    sink.sendall(data)
                    setattr(self, way, getattr(self, way) + len(data))
            for link in (source, sink):
                with suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)


class Federation:
    """A site, its coordinator and its nodes, all on loopback with TLS and node keys; a wire between the two sides.

    A node is started as its kit does it, or by the command and with the environment that ``bare`` makes of its kit.
    """

    def __init__(
        self, folder: Path, nodes: int, settings: Callable[[int], list[str]], bare: Bare | None = None
    ) -> None:
        self.folder, self.site = folder, folder / "site"
        self.fleet, self.control, listen = free_port(), free_ports(2), free_port()
        self.names = [f"node-{number:03d}" for number in range(nodes)]
        ports = ["--fleet-port", str(self.fleet), "--control-port", str(self.control)]
        place = ["--state", str(folder / "state"), "--address", "127.0.0.1"]
        bouquet("site", "create", str(self.site), "--name", "wards", *ports, *place, "--nodes", *self.names)
        for number, name in enumerate(self.names):
            own = [f"state-directory={folder / name}", *settings(number)]
            installed = ["--installed", str(self.site / "kits" / name)]
            bouquet("site", "kit", str(self.site), name, "--port", str(free_ports(2)), *installed, *own)
        self.allow("coordinator", *(f"kits/{name}" for name in self.names))
        self.wire = Wire(self.fleet, listen)
        self.superlink = Process(
            [str(self.site / "coordinator/superlink.sh")],
            folder / "superlink.log",
            BOUQUET_LISTEN=f"127.0.0.1:{listen}",
        )
        # The coordinator has all threads, and torch's code for CPUs without wide vectors; a node has one thread.
        unlike = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "ATEN_CPU_CAPABILITY": "default"}
        self.superexec = Process([str(self.site / "coordinator/superexec.sh")], folder / "superexec.log", **unlike)
        wait_for(lambda: listens(self.control) and listens(listen), "the SuperLink")
        bouquet("site", "register", str(self.site))
        kits = {name: self.site / "kits" / name for name in self.names}
        commands = {name: bare(kit) if bare else ([str(kit / "start.sh")], {}) for name, kit in kits.items()}
        self.nodes = {name: Process(command, self.log(name), **own) for name, (command, own) in commands.items()}

    def allow(self, *kits: str, app: Path | None = None) -> None:
        """Let the bundle of an app, without one this release's, run where these kits are."""
        for kit in kits:
            with (self.site / kit / "bundles.txt").open("a") as file:
                file.write(f"{bundle.of_app(app) if app else bundle.of_this_release()}\n")

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def submit(self, name: str, settings: str, directory: Path) -> str:
        """Start a run of Bouquet's; return its id."""
        with app_alone() as app:
            return self.start_run(app, f'{settings} run-directory="{directory}" run-name="{name}"')

    def start_run(self, app: Path, settings: str) -> str:
        """Start a run of the app in a folder; return its id. A SuperLink that has just been started is asked again."""
        answer: dict[str, Any] = {}
        for _ in range(5):
            answer = self._flwr("run", str(app), "wards", "--run-config", settings)
            if "run-id" in answer:
                return str(answer["run-id"])
            time.sleep(2)
        raise AssertionError(answer)

    def status(self, run: str) -> str:
        """Flower's word for it; ``unknown`` while the SuperLink is away."""
        runs = self._flwr("ls", "wards", "--run-id", run).get("runs")
        return str(runs[0]["status"]) if runs else "unknown"

    def wait(self, run: str, limit: float = 900.0) -> str:
        """The status in which a run has ended. Until then no `flwr` is started to ask for it."""
        wait_for(lambda: self._ended(run), f"run {run}", limit)
        return self.status(run)

    def _ended(self, run: str) -> bool:
        """Whether the SuperLink has written down that a run has ended; it keeps ids as signed numbers."""
        signed = int.from_bytes(int(run).to_bytes(8, "little"), "little", signed=True)
        query = "SELECT finished_at FROM run JOIN task ON task_id = primary_task_id WHERE run.run_id = ?"
        with sqlite3.connect(self.folder / "state/superlink.db") as database:
            return database.execute(query, (signed,)).fetchone() != (None,)

    def bundle_bytes(self) -> int:
        """The size of the app as the SuperLink keeps it."""
        with sqlite3.connect(self.folder / "state/superlink.db") as database:
            return int(database.execute("SELECT max(length(content)) FROM fab").fetchone()[0])

    def close(self) -> None:
        for process in (*self.nodes.values(), self.superexec, self.superlink):
            process.stop()
        for name in self.names:
            worker.stop(self.folder / name)  # it outlives the node that has started it
        self.wire.close()

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        finished = subprocess.run(
            [program("flwr"), *arguments, "--format", "json"],
            env=quiet(FLWR_HOME=str(self.site / "flower")),
            capture_output=True,
            text=True,
            timeout=60,
        )
        start = finished.stdout.find("{")
        assert start >= 0, finished.stdout + finished.stderr
        return json.loads(finished.stdout[start:])


@contextmanager
def federation(
    folder: Path, nodes: int, settings: Callable[[int], list[str]], bare: Bare | None = None
) -> Iterator[Federation]:
    with ExitStack() as stack:
        running = Federation(folder, nodes, settings, bare)
        stack.callback(running.close)
        yield running


def bouquet(*arguments: str) -> None:
    assert main(arguments) == 0


def simulate(home: Path, nodes: int, settings: str, directory: Path, name: str) -> dict[str, Any]:
    """The same run as a simulation; its summary."""
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text('[superlink.local]\naddress = ":local:"\n')
    overrides = f'{settings} run-directory="{directory}" run-name="{name}"'
    federation = f"num-supernodes={nodes} client-resources-num-cpus={CORES}"
    command = ["local", "--stream", "--run-config", overrides, "--federation-config", federation]
    try:
        with app_alone() as app:
            finished = subprocess.run(
                [program("flwr"), "run", str(app), *command],
                env=quiet(FLWR_HOME=str(home)),
                capture_output=True,
                text=True,
                timeout=900,
            )
    finally:
        stop_local_superlink(home)
    summary = directory / name / "summary.json"
    assert summary.exists(), finished.stdout[-4000:] + finished.stderr[-2000:]
    return json.loads(summary.read_text())


def stop_local_superlink(home: Path) -> None:
    """The SuperLink that `flwr run` starts for a simulation outlives it."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            ours = f"FLWR_HOME={home}".encode() in environ.read_bytes().split(b"\0")
        except OSError:
            continue
        if ours:
            with suppress(ProcessLookupError):
                os.kill(int(environ.parent.name), signal.SIGTERM)


def holders(state: Path) -> list[int]:
    """The processes that hold the lock of the worker whose state directory this is."""
    inode = (state / "worker.lock").stat().st_ino
    lines = Path("/proc/locks").read_text().splitlines()
    return [int(line.split()[4]) for line in lines if line.split()[5].endswith(f":{inode}")]


def wait_for(condition: Callable[[], object], what: str, limit: float = 240.0, pause: float = 0.2) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"waited {limit:g} s for {what}"
        time.sleep(pause)
