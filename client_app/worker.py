"""A process that keeps the model warm between messages.

Flower starts a fresh process for every message, which imports everything and loads the base again. With ``warm`` in the
node config, that process hands its message to a worker and only carries the answer back. The worker listens on a Unix
socket in the node's state directory that its owner alone can open, is started when it is missed, and ends after
``warm`` idle seconds, or when told to (``client_app/gpu.py`` keeps two of them off one GPU):

    python -m client_app.worker stop STATE_DIRECTORY

What crosses the socket is in ``client_app/link.py``.
"""

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from client_app.link import packed, pose, receive, send, unpacked
from common import durable, owned
from common.config.node import NodeConfig
from common.error import BouquetError
from common.version import ROOT, fingerprint

START_SECONDS = 60.0
AGAIN_SECONDS = 15.0
STOP, OTHER_CODE = b"stop", b"other code"


def hand_over(message: Message, context: Context, state: Path, idle: float) -> Message:
    """The worker's answer to a message; the worker is started if there is none. Raises :class:`BouquetError`."""
    frames = (fingerprint().encode(), *packed(context, message))
    again, limit = 0.0, time.monotonic() + START_SECONDS
    while (answer := _ask(state, frames)) in (None, OTHER_CODE):
        if (now := time.monotonic()) > limit:
            raise BouquetError("the worker does not start", where=str(state / "worker.log"), cure="Read its log.")
        if now > again:
            with durable.writing("what the worker needs", state, durable.OF_A_NODE):
                if not _running(state):
                    _start(state, idle)
                    again = now + AGAIN_SECONDS
        time.sleep(0.05)
    content = RecordDictProto()
    content.ParseFromString(answer)
    return Message(recorddict_from_proto(content), reply_to=message)


def stop(state: Path) -> None:
    """End the worker, if there is one, and free what it holds."""
    _ask(state, (STOP,))


def serve(state: Path, idle: float) -> None:
    """Answer one message after the other until none has come for ``idle`` seconds. Returns at once if one serves."""
    with (state / "worker.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        with _listening(state / "worker.sock") as server:
            server.settimeout(idle)
            with suppress(TimeoutError):
                while _serve_one(server, state):
                    pass


def _serve_one(server: socket.socket, state: Path) -> bool:
    """Answer one message; False where the worker is to end, having no GPU of its own, say."""
    link, _ = server.accept()
    with link, suppress(ConnectionError):
        link.settimeout(None)
        first = receive(link)
        if first == STOP:
            return False
        context, message = receive(link), receive(link)
        if first != fingerprint().encode():
            send(link, OTHER_CODE)
            return False
        try:
            reply = _work(context, message, state)
        except BouquetError as error:
            # Into the log before the link closes: who asked reads it then.
            print(error, file=sys.stderr, flush=True)
            return False
        send(link, reply)
    return True


def _work(context: bytes, message: bytes, state: Path) -> bytes:
    from client_app import gpu
    from client_app.answer import answer

    told, asked = unpacked(context, message)
    for each in gpu.identities(NodeConfig.from_flower(told.node_config).devices):
        gpu.reserve(each, state)
    pose(told.run_id, told.node_id)
    reply = answer(asked, told)
    content: bytes = recorddict_to_proto(reply.content or RecordDict()).SerializeToString()
    return content


def _ask(state: Path, frames: tuple[bytes, ...]) -> bytes | None:
    """Send ``frames`` to the worker; its answer, or None where there is none to ask."""
    with socket.socket(socket.AF_UNIX) as link:
        try:
            link.connect(_address(state / "worker.sock"))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        try:
            for frame in frames:
                send(link, frame)
            return receive(link)
        except ConnectionError as error:
            if frames[0] == STOP:
                return None
            raise BouquetError(
                "the worker ended before it answered",
                where=str(state / "worker.log"),
                cure="Read its log. If it gives no reason, memory ran out: see bouquet doctor node.",
            ) from error


def _start(state: Path, idle: float) -> None:
    """Start a worker that outlives its starter; of two that are started at once, one ends itself."""
    if not state.exists():
        owned.make_folder(state)
    with (state / "worker.log").open("ab") as log:
        subprocess.run(
            ["sh", "-c", '"$0" "$@" &', sys.executable, "-m", "client_app.worker", "serve", str(state), str(idle)],
            check=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _running(state: Path) -> bool:
    """Whether a worker holds the lock, or is about to."""
    lock = state / "worker.lock"
    if not lock.exists():
        return False
    with lock.open("a") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """A socket of mode 0600, gone when the block ends."""
    path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        server = socket.socket(socket.AF_UNIX)
        server.bind(_address(path))
    finally:
        os.umask(before)
    with server:
        server.listen()
        try:
            yield server
        finally:
            path.unlink(missing_ok=True)


def _address(path: Path) -> str:
    if len(os.fsencode(path)) > 107:
        raise BouquetError(
            "a path too long for a socket",
            where=str(path),
            expected="at most 107 bytes",
            cure="Choose a shorter state-directory, or warm = 0.0.",
        )
    return str(path)


if __name__ == "__main__":
    # The app that a message reaches must see this module under its own name, not as ``__main__``.
    from client_app import worker

    if sys.argv[1] == "serve":
        worker.serve(Path(sys.argv[2]), float(sys.argv[3]))
    else:
        worker.stop(Path(sys.argv[2]))
