"""What a person has to hear of while a run goes on, told to a webhook."""

from collections.abc import Mapping
from threading import Thread
from typing import Any

from common import webhook

SENTENCES = {
    "void": "round {round} does not count: {replies} replied, {needed} needed",
    "sit-out": "{node} sits out {rounds} rounds after {failures} failures in a row",
    "camps": "the nodes fall in two camps in round {round}: {smaller} of {nodes} went against the others",
    "stopped": "stopped: {ended}",
}
"""What is said of an event. No reason of a failure leaves, which may quote a record or a path."""


class Webhook:
    """A listener of the record, where the environment names a webhook."""

    name = "webhook"

    def __init__(self, run: str) -> None:
        self._run = run
        self._under_way: list[Thread] = []

    def hear(self, event: Mapping[str, Any]) -> None:
        """Tell an event that somebody may have to act on."""
        if sentence := SENTENCES.get(str(event["phase"])):
            text = f"run {self._run}: {sentence.format_map(event)}"
            told = webhook.tell(text, run=self._run, phase=event["phase"], round=event["round"])
            self._under_way = [thread for thread in (*self._under_way, told) if thread and thread.is_alive()]

    def close(self) -> None:
        """Wait for what is under way, as long as one post may take."""
        for thread in self._under_way:
            thread.join(webhook.TIMEOUT)
