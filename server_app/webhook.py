"""What somebody must know while a run is under way, sent to a webhook."""

from threading import Thread

from common import webhook
from common.record.event import Event
from common.record.events import Camps, SitOut, Stopped, Void


class Webhook:
    """A listener of the record, where the environment names a webhook."""

    name = "webhook"

    def __init__(self, run: str) -> None:
        self._run = run
        self._under_way: list[Thread] = []

    def hear(self, event: Event) -> None:
        """Tell an event that somebody may have to act on."""
        if sentence := _sentence(event):
            told = webhook.tell(f"run {self._run}: {sentence}", run=self._run, phase=event.phase, round=event.round)
            self._under_way = [thread for thread in (*self._under_way, told) if thread and thread.is_alive()]

    def close(self) -> None:
        """Wait for what is under way, as long as one post may take."""
        for thread in self._under_way:
            thread.join(webhook.TIMEOUT)


def _sentence(event: Event) -> str:
    """What is said of an event; empty for most. No reason of a failure leaves, which may quote a record or a path."""
    match event:
        case Void():
            return f"round {event.round} does not count: {event.replies} replied, {event.needed} needed"
        case SitOut():
            return f"{event.node} sits out {event.rounds} rounds after {event.failures} failures in a row"
        case Camps():
            camps = f"{event.smaller} of {event.nodes} went against the others"
            return f"the nodes fall into two camps in round {event.round}: {camps}"
        case Stopped():
            return f"stopped: {event.ended}"
    return ""
