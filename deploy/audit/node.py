"""The audited node: in this process, with data, a ledger and a policy that are thrown away.

Nothing of it is rebuilt here. It gets the messages that the coordinator would send, through Flower's own serialisation,
and answers them by the ClientApp; what it answers is read as the coordinator reads it.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.supercore.task_identity import TaskIdentity

from client_app.app import app
from client_app.session import Session
from client_app.units import Units
from common.adapter.values import State, Update
from common.config.run import RunConfig
from common.error import BouquetError
from common.models import adapted
from common.privacy import accounting, ledger
from common.record import peft_folder
from strategies import Recipe
from strategies.strategy import LoraStrategy, Recipient

OPEN = 'models = ["*"]\n[data]\nsources = ["*"]\n'
"""The policy of a node whose operator has named none: the user of this command is coordinator and operator in one."""

ENOUGH = 1e9
"""A limit that no audit spends; a policy with ``max-epsilon`` asks for one."""

Lines = Sequence[Mapping[str, Any] | str]
"""The records of a data set; a string is a line of its file as it stands, which need not be JSON."""


@dataclass(frozen=True)
class Turn:
    """One round of a node: the message that it got, and the update that the coordinator read in its answer."""

    message: Message
    update: Update


@dataclass
class Bench:
    """Makes nodes of one run ``config`` in a ``folder``; each has its own data and its own state directory.

    ``policy`` is the operator's file, empty for one that allows all. With more than one of ``nodes`` the data is dealt
    out as the run's source is, and the first part is the audited node's; with one, it is the node's own. ``log`` is
    what the nodes told their operator.
    """

    config: RunConfig
    folder: Path
    policy: str = ""
    nodes: int = 1
    log: StringIO = field(default_factory=StringIO)
    _made: int = 0

    @property
    def failed(self) -> int:
        """How many errors the nodes have kept from the coordinator."""
        return self.log.getvalue().count("Traceback")

    def node(self, lines: Lines, **changes: Any) -> "Node":
        """A node with this data and a ledger without a row; ``changes`` are keys of the run config."""
        self._made += 1
        folder = self.folder / f"node-{self._made}"
        folder.mkdir()
        data = folder / "data.jsonl"
        texts = (line if isinstance(line, str) else json.dumps(line, default=str) for line in lines)
        data.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        place = {"data": str(data)} if self.nodes == 1 else {"num-partitions": self.nodes}
        facts = {**place, **self._public(), "state-directory": str(folder / "state")}
        flat = self.config.to_flower() | {"data.source": str(data), "run-name": "audit", "resume": False} | changes
        return Node(flat, facts, self.log)

    def _public(self) -> dict[str, Any]:
        """What the operator says of the node, apart from where it is."""
        file = Path(self.policy).expanduser().resolve() if self.policy else self.folder / "policy.toml"
        if not self.policy:
            file.write_text(OPEN, encoding="utf-8")
        # A file that cannot be read is told by the node itself.
        written = tomllib.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        limit = ENOUGH if written.get("privacy", {}).get("max-epsilon") else 0.0
        return {"policy": str(file), "privacy-epsilon": limit, "privacy-delta": self.config.privacy.delta}


class Node:
    """One node, and the coordinator that it talks to."""

    def __init__(self, flat: dict[str, Any], facts: dict[str, Any], log: StringIO) -> None:
        # Flower makes messages only inside an app that it has started.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self._context = Context(run_id=1, node_id=1, node_config=facts, state=RecordDict(), run_config=flat)
        self._log = log
        self.config = self.session.config
        self.recipe = Recipe.build(self.config)
        self._strategy = LoraStrategy(self.recipe)

    @property
    def session(self) -> Session:
        """The node at work on a message: it is made anew for each, as here."""
        return Session(self._context)

    @property
    def units(self) -> Units:
        """What the node trains on."""
        with redirect_stderr(self._log):
            return self.session.units()

    def initial(self) -> State:
        """The state before the first round."""
        spec = self._described()
        return self.recipe.start(spec, self.config.seed, given=peft_folder.given(self.config, spec))

    def message(self, kind: str, state: State | None = None, *, score: bool = False) -> Message:
        """What the coordinator sends; without a state, the roll call. ``score`` asks for one before the training."""
        if state is None:
            message = Message(RecordDict(), dst_node_id=1, message_type=kind)
        else:
            rank = self.session.exchange.rank
            recipient, wanted = Recipient(1, self.session.node.label, rank), ConfigRecord({"score": score})
            (message,) = self._strategy.messages(kind, state, [recipient], config=wanted)
        message.content = _travelled(message.content)
        message.metadata.__dict__["_message_id"] = "message"
        return message

    def answer(self, message: Message) -> Message:
        """The node's reply as it arrives."""
        with redirect_stderr(self._log):
            reply = app(message, self._context)
        reply.content = _travelled(reply.content)
        return reply

    def turns(self, state: State) -> Iterator[tuple[Turn, State]]:
        """A whole run of the node alone, from ``state``: each round, and the state that is merged of it.

        Raises :class:`BouquetError` where the node does not answer with an update.
        """
        for _ in range(self.config.num_server_rounds):
            message = self.message(MessageType.TRAIN, state)
            turn = Turn(message, self._strategy.accept(state, self.answer(message)).update)
            state = self._strategy.merge(state, [turn.update], 1)
            yield turn, state

    def spent(self) -> float:
        """The claim: epsilon of every release in the ledger, at the run's delta. Raises :class:`BouquetError`."""
        node, privacy = self.session.node, self.config.privacy
        rows = ledger.read(node.ledger, node.witness)
        return accounting.epsilon([row.release for row in rows], privacy.delta, privacy.accountant)

    def _described(self) -> Any:
        config = self.config
        return adapted.describe(config.model, config.lora, config.task, self.recipe.structure)


def checked(node: Node) -> None:
    """Raise :class:`BouquetError` where the node would refuse this run, or has nothing to train on."""
    failure = node.answer(node.message(MessageType.QUERY)).content.config_records.get("failure")
    if failure is not None:
        raise BouquetError("the node refuses this run", got=str(failure["reason"]))
    if not node.units.train:
        raise BouquetError(
            "the node has nothing to train on",
            where="data.source",
            expected="records that the task can use",
            got="none",
            cure="Set the task.* keys to the fields of your records.",
        )


def _travelled(content: RecordDict) -> RecordDict:
    """A copy that has been through Flower's own serialisation."""
    return recorddict_from_proto(recorddict_to_proto(content))
