"""The reply to one message, whatever happens."""

import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from client_app.simulation import simulated
from common.config.node import NodeConfig
from common.config.section import ConfigError
from common.error import BouquetError, RefusalError, on_one_line

if TYPE_CHECKING:
    from client_app.session import Session

# Of a defect's traceback, the innermost frames travel where the policy lets details leave.
FRAMES = 6
DEFECT = "an unexpected error"
ELSEWHERE = "; see this node's own log"


def answer(message: Message, context: Context, elsewhere: Callable[[NodeConfig], Message] | None = None) -> Message:
    """The reply to a message: checked against the node's policy, and in its audit log, before it leaves.

    A node that keeps its model warm has it made ``elsewhere``. An error is a reply too, so that the coordinator can say
    why a node failed: a refusal in full, since it holds facts of configs alone; anything else as one fixed sentence,
    since it may hold pieces of the data, unless the node's policy lets details leave.
    """
    session = None
    try:
        if (node := NodeConfig.from_flower(context.node_config)).warm and elsewhere is not None:
            return elsewhere(node)
        from client_app.scripted import session_of

        session = session_of(context, node)
        content = _work(session, message, context)
        session.check(message.metadata.message_type, content)
    except Exception as error:
        content = _failure(error, context)
    try:
        from client_app import audit

        told = (session.round, session.epsilon) if session else (0, None)
        audit.write(_node(context), message, content, audit.run_name(context), *told)
    except BouquetError as error:
        # What is not written down does not leave.
        content = _failure(error, context)
    return Message(content, reply_to=message)


def _work(session: "Session", message: Message, context: Context) -> RecordDict:
    from client_app import gpu

    kind = message.metadata.message_type
    if kind == MessageType.QUERY:
        return session.answer_roll_call()
    # In a simulation whoever starts it deals the GPU out, to several nodes at once where they were told to.
    with gpu.turn(*() if simulated() else gpu.identities(session.node.devices)):
        if kind == MessageType.EVALUATE:
            return session.evaluate(message)
        wanted = message.content.config_records.get("config", ConfigRecord())
        if wanted.get("score") is not True:
            return session.train(message)
        return _score_and_train(session, message, context)


def _score_and_train(session: "Session", message: Message, context: Context) -> RecordDict:
    """What a node answers to a message of each kind with one state, in one reply.

    Each is done, charged and refused as if it had come by itself, and neither's failure is the other's.
    """
    try:
        scored = dict(session.evaluate(message))
        told: dict[str, Any] = {"score" if name == "metrics" else name: record for name, record in scored.items()}
    except Exception as error:
        told = {"unscored": _failure(error, context)["failure"]}
    try:
        return RecordDict({**session.train(message), **told})
    except Exception as error:
        return RecordDict({**_failure(error, context), **told})


def _node(context: Context) -> NodeConfig:
    """The node's config; the defaults where it has mistakes, which the reply will tell."""
    try:
        return NodeConfig.from_flower(context.node_config)
    except ConfigError:
        return NodeConfig()


def _failure(error: Exception, context: Context) -> RecordDict:
    """A reply that says why there is no other; ``refused`` where asking again will not help."""
    refused = isinstance(error, RefusalError | ConfigError)
    frames = "".join(traceback.format_exception(error, limit=-FRAMES))
    whole = str(error) if isinstance(error, BouquetError) else f"{type(error).__name__}: {error}\n{frames}"
    # A coordinator may have written some of it, and is to write no line of this machine's journal.
    print("\n    ".join(map(on_one_line, whole.split("\n"))), file=sys.stderr)
    if isinstance(error, RefusalError) or _tells_details(context):
        reason = whole
    else:
        reason = (error.what if isinstance(error, BouquetError) else DEFECT) + ELSEWHERE
    return RecordDict({"failure": ConfigRecord({"reason": reason, "refused": refused})})


def _tells_details(context: Context) -> bool:
    """Whether the text of an error may leave: by the node's policy, and in a private run in a simulation alone."""
    from client_app.policy import Policy

    if simulated():
        return True
    try:
        node = NodeConfig.from_flower(context.node_config)
        return context.run_config.get("privacy.mode", "none") == "none" and Policy.of(node).tell.details
    except BouquetError:
        return False
