"""The coordinator's figures for Prometheus, while a run lasts.

They are computed from the record's events and from nothing else. It listens on this machine alone unless
``metrics.address`` says otherwise: there is no login.
"""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, ProcessCollector, start_http_server

from common.config.coordinator import MetricsConfig
from common.error import BouquetError


class Exporter:
    """An HTTP server of a run's figures. Raises :class:`BouquetError` where the port cannot be had."""

    name = "prometheus"

    def __init__(self, config: MetricsConfig, run: str, rule: str) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("bouquet_run", "The run", registry=registry).info({"run": run, "rule": rule})
        self._round = Gauge("bouquet_round", "Rounds that are finished", registry=registry)
        self._asked = Gauge("bouquet_nodes_asked", "Nodes asked in the last round", registry=registry)
        self._replied = Gauge("bouquet_nodes_replied", "Nodes whose update was merged in it", registry=registry)
        self._seconds = Gauge("bouquet_round_seconds", "Seconds that it took", registry=registry)
        self._lost = Gauge("bouquet_aggregation_error", "Share of the ideal update it lost", registry=registry)
        self._loss = Gauge("bouquet_loss", "The last loss", ["of"], registry=registry)
        self._bytes = Counter("bouquet_bytes", "Bytes of adapters", ["direction"], registry=registry)
        self._failures = Counter("bouquet_failures", "Failures of nodes", ["during"], registry=registry)
        self._late = Counter("bouquet_late_replies", "Replies after their deadline", registry=registry)
        self._void = Counter("bouquet_void_rounds", "Attempts that did not count", registry=registry)
        try:
            self._server, self._thread = start_http_server(config.port, config.address, registry)
        except OSError as error:
            raise BouquetError(
                "the port for Prometheus cannot be had",
                where=f"metrics.port = {config.port}, metrics.address = {config.address}",
                got=str(error.strerror or error),
                cure="Is another run using it? Choose another metrics.port.",
            ) from error

    def hear(self, event: Mapping[str, Any]) -> None:
        """Bring the figures up to date."""
        phase = event["phase"]
        if phase == "merge":
            self._round.set(event["round"])
            self._asked.set(event["asked"])
            self._replied.set(event["nodes"])
            self._seconds.set(event["seconds"])
        elif phase == "aggregation-error":
            self._lost.set(event["overall"])
        elif phase == "failure":
            self._failures.labels(event["during"]).inc()
        elif phase == "late":
            self._late.inc()
        elif phase == "void":
            self._void.inc()
        if "node" in event:  # what follows is of all nodes together
            return
        if "loss" in event:
            self._loss.labels({"merge": "train"}.get(phase, phase)).set(event["loss"])
        for direction in ("up", "down"):
            self._bytes.labels(direction).inc(event.get(f"bytes_{direction}", 0))

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
