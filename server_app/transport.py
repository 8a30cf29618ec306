"""Messages out over Flower's grid, and the replies to them: as they come, too late, or unreadable."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from common import wire
from common.record.events import Late
from server_app.record import Record, few
from strategies.replies import explained

POLL_SECONDS = 0.1
PROGRESS_SECONDS = 60.0
# Messages that go out in one call, in which Flower sends what they have in common once.
PUSHED_TOGETHER = 500
# Replies that are pulled in one call: as many as these bytes hold, and no more. One that Flower cannot read takes those
# pulled with it along, so there is one a call where few are waited for, and in the whole run once that has happened. A
# reply is given up after some tries.
PULLED_BYTES, PULLED_TOGETHER, FEW_WAITING, TRIES = 64 * 2**20, 64, 32, 3
UNSENT = "unsent "


class Transport:
    """What is under way between the coordinator and the nodes of one run."""

    def __init__(self, grid: Grid, record: Record) -> None:
        self._grid = grid
        self._record = record
        self._overdue: dict[str, tuple[str, str, int]] = {}
        self._unreadable: Counter[str] = Counter()

    def push(self, messages: Sequence[Message]) -> list[str]:
        """Send messages; return their ids, or a stand-in for each that Flower did not take, which nobody answers."""
        ids: list[str] = []
        for first in range(0, len(messages), PUSHED_TOGETHER):
            some = messages[first : first + PUSHED_TOGETHER]
            taken = list(self._grid.push_messages(some))
            if len(taken) < len(some) > 1:  # too much for one call
                taken = [(list(self._grid.push_messages([message])) or [""])[0] for message in some]
            unsent = [f"{UNSENT}{message.metadata.dst_node_id}" for message in some]
            ids += [own or stand_in for own, stand_in in zip(taken or [""], unsent, strict=True)]
        return ids

    def collect(
        self, waiting: Mapping[str, str], seconds: float, phase: str = "", draw: int = 0, size: int = 0
    ) -> Iterator[tuple[str, Message | None]]:
        """Replies as they come, by the name in ``waiting``; None for each that has not come after ``seconds``.

        Those of a ``phase`` are counted if they come later. ``size`` is about how many bytes a reply has.
        """
        limit = time.monotonic() + seconds
        waiting = dict(waiting)
        said = time.monotonic()
        while any(self._may_come(message_id) for message_id in waiting) and time.monotonic() < limit:
            for reply in self._pull([*waiting, *self._overdue], size):
                message_id = reply.metadata.reply_to_message_id
                if name := waiting.pop(message_id, ""):
                    yield name, reply
                else:
                    self._note_late(message_id, reply)
            if waiting and time.monotonic() - said > PROGRESS_SECONDS:
                self._record.say(f"    waiting for {few(waiting.values())}")
                said = time.monotonic()
            if waiting:
                time.sleep(POLL_SECONDS)
        for message_id, name in waiting.items():
            if phase:
                self._overdue[message_id] = name, phase, draw
            yield name, None

    def _may_come(self, message_id: str) -> bool:
        return not is_unsent(message_id) and self._unreadable[message_id] < TRIES

    def _pull(self, asked: list[str], size: int) -> Iterator[Message]:
        """The replies that are there to the messages in ``asked``; what Flower cannot read of them is passed over."""
        asked = [message_id for message_id in asked if self._may_come(message_id)]
        singly = len(asked) <= FEW_WAITING or self._unreadable.total()
        together = 1 if singly else max(1, min(PULLED_TOGETHER, PULLED_BYTES // max(1, size)))
        for first in range(0, len(asked), together):
            some = asked[first : first + together]
            try:
                # Flower hands over all that it is asked for at once: a few at a time.
                replies = list(self._grid.pull_messages(some))
            except Exception as reason:  # a boundary: Flower reads what a node has sent
                self._unreadable.update(some)
                self._record.say(f"    Flower cannot deliver a reply: {' '.join(explained(reason).split())}")
                continue
            yield from replies

    def _note_late(self, message_id: str, reply: Message) -> None:
        """Count a reply that came after its deadline; nothing else is done with it."""
        name, phase, draw = self._overdue.pop(message_id, ("", "", 0))
        if name and not reply.has_error():
            said = f"replied to {phase} of round {draw} after its deadline: not used"
            self._record.note(Late(round=draw, node=name, during=phase), said)


def is_unsent(message_id: str) -> bool:
    """Whether :meth:`Transport.push` could not send a message."""
    return message_id.startswith(UNSENT)


def state_bytes(message: Message) -> int:
    """The bytes of the state in a message, as they travel."""
    return wire.payload_bytes(message.content.array_records["state"])
