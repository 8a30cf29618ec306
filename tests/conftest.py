"""Shared fixtures. Real data and models are read from ``../shared``; tests that need them skip where it is not."""

import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

from common import webhook
from tests.support.configs import small

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared"

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the real data and models are not in {SHARED}")
    return SHARED


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes in one process are all there at once."""
    monkeypatch.setattr("server_app.nodes.STEADY_SECONDS", 0.0)
    monkeypatch.setattr("server_app.nodes.POLL_SECONDS", 0.01)
    monkeypatch.setattr("server_app.transport.POLL_SECONDS", 0.01)


@pytest.fixture(autouse=True)
def _no_trace_in_the_users_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("common.config.node.STATE_DIRECTORY", tmp_path / "state")
    monkeypatch.setattr("server_app.record.DEFAULT_DIRECTORY", tmp_path / "runs")


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A small run config in Flower's flat form: ``settings(**{"rule.name": "fedit"})``."""

    return partial(small, tmp_path)


@pytest.fixture
def heard(monkeypatch) -> Iterator[list[dict]]:
    """What is posted to the address that the environment names."""
    bodies = []

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv(webhook.VARIABLE, f"http://127.0.0.1:{server.server_port}/secret")
        yield bodies
        server.shutdown()
        thread.join()
