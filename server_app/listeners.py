"""What receives every event of a run as it is written: trackers, the Prometheus exporter, a webhook."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from common import webhook
from common.config.run import RunConfig
from common.record.event import Event
from server_app.webhook import Webhook


class Listener(Protocol):
    """One of them, by the ``name`` that a person is told."""

    name: str

    def hear(self, event: Event) -> None: ...

    def close(self) -> None: ...


def started(config: RunConfig, folder: Path) -> list[Listener]:
    """Those that the config asks for; their libraries are imported for nobody else.

    Raises :class:`BouquetError` where one does not start; the others are closed then.
    """
    with ExitStack() as closing:
        listeners: list[Listener] = [Webhook(folder.name)] if os.environ.get(webhook.VARIABLE) else []
        if config.metrics.port:
            from server_app.exporter import Exporter

            listeners.append(Exporter(config.metrics, folder.name, config.rule))
            closing.callback(listeners[-1].close)
        for name in config.tracking.names:
            from server_app.tracker import Tracker

            listeners.append(Tracker(name, folder, config))
            closing.callback(listeners[-1].close)
        closing.pop_all()  # all or none
        return listeners
