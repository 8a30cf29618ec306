"""The coordinator's figures for Prometheus, while a run lasts.

They are computed from the record's events and from nothing else. It listens on this machine alone unless
``metrics.address`` says otherwise: there is no login.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, ProcessCollector, start_http_server

from common.config.coordinator import MetricsConfig
from common.error import BouquetError
from common.record.event import Event
from common.record.events import AggregationError, Central, Failure, HeldOut, Late, Merge, Void


class Exporter:
    """An HTTP server of a run's figures. Raises :class:`BouquetError` where the port cannot be opened."""

    name = "prometheus"

    def __init__(self, config: MetricsConfig, run: str, rule: str) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("bouquet_run", "The run", registry=registry).info({"run": run, "rule": rule})
        self._round = Gauge("bouquet_round", "Finished rounds", registry=registry)
        self._asked = Gauge("bouquet_nodes_asked", "Nodes asked in the last round", registry=registry)
        self._replied = Gauge(
            "bouquet_nodes_replied", "Nodes whose update was merged in the last round", registry=registry
        )
        self._seconds = Gauge("bouquet_round_seconds", "Seconds that the last round took", registry=registry)
        self._lost = Gauge(
            "bouquet_aggregation_error", "Share of the ideal update that the last round lost", registry=registry
        )
        self._loss = Gauge("bouquet_loss", "The last loss", ["of"], registry=registry)
        self._bytes = Counter("bouquet_bytes", "Bytes of adapters", ["direction"], registry=registry)
        self._failures = Counter("bouquet_failures", "Failures of nodes", ["during"], registry=registry)
        self._late = Counter("bouquet_late_replies", "Replies after their deadline", registry=registry)
        self._void = Counter("bouquet_void_rounds", "Attempts that did not count", registry=registry)
        try:
            self._server, self._thread = start_http_server(config.port, config.address, registry)
        except OSError as error:
            raise BouquetError(
                "the port for Prometheus cannot be opened",
                where=f"metrics.port = {config.port}, metrics.address = {config.address}",
                got=str(error.strerror or error),
                cure="Another run may be using it: choose another metrics.port.",
            ) from error

    def hear(self, event: Event) -> None:
        """Bring the figures up to date."""
        match event:
            case Merge():
                self._round.set(event.round)
                self._asked.set(event.asked)
                self._replied.set(event.nodes)
                self._seconds.set(event.seconds)
                self._hear_loss("train", event.loss)
            case HeldOut() | Central():
                self._hear_loss(event.phase, event.loss)
            case AggregationError() if event.overall is not None:
                self._lost.set(event.overall)
            case Failure():
                self._failures.labels(event.during).inc()
            case Late():
                self._late.inc()
            case Void():
                self._void.inc()
        for direction, size in event.crossed.items():
            self._bytes.labels(direction).inc(size)

    def _hear_loss(self, of: str, loss: float | None) -> None:
        if loss is not None:
            self._loss.labels(of).set(loss)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
