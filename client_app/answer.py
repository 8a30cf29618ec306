"""The reply to one message, whatever comes of it."""

import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from common.error import BouquetError, RefusalError
from common.node_config import NodeConfig
from common.section import ConfigError

if TYPE_CHECKING:
    from client_app.session import Session

# Of a defect's traceback, the innermost frames travel.
FRAMES = 6
WITHHELD = "an error that a private run does not tell, since its text may hold some of the data; the node's log has it"


def answer(message: Message, context: Context, elsewhere: Callable[[NodeConfig], Message] | None = None) -> Message:
    """The reply to a message: checked against the node's policy, and in its audit log, before it leaves.

    A node that keeps its model warm has it made ``elsewhere``. An error is a reply too, so that the coordinator can say
    why a node failed. From a private run only the reasons go that hold none of the data.
    """
    session = None
    try:
        if (node := NodeConfig.from_flower(context.node_config)).warm and elsewhere is not None:
            return elsewhere(node)
        from client_app.session import Session

        session = Session(context)
        content = _work(session, message)
        session.check(message.metadata.message_type, content)
    except (RefusalError, ConfigError) as error:
        print(error, file=sys.stderr)
        content = _failure(str(error), refused=True)
    except Exception as error:
        known = isinstance(error, BouquetError)
        frames = "".join(traceback.format_exception(error, limit=-FRAMES))
        reason = str(error) if known else f"{type(error).__name__}: {error}\n{frames}"
        print(reason, file=sys.stderr)
        private = context.run_config.get("privacy.mode", "none") != "none"
        content = _failure(WITHHELD if private else reason)
    from client_app import audit

    audit.write(_node(context), message, content, session.epsilon if session else None)
    return Message(content, reply_to=message)


def _work(session: "Session", message: Message) -> RecordDict:
    kind = message.metadata.message_type
    if kind == MessageType.TRAIN:
        return session.train(message)
    return session.evaluate(message) if kind == MessageType.EVALUATE else session.answer_roll_call()


def _node(context: Context) -> NodeConfig:
    """The node's config; the defaults where it has mistakes, which the reply will tell."""
    try:
        return NodeConfig.from_flower(context.node_config)
    except ConfigError:
        return NodeConfig()


def _failure(reason: str, refused: bool = False) -> RecordDict:
    """A reply that says why there is no other; ``refused`` where asking again will not help."""
    return RecordDict({"failure": ConfigRecord({"reason": reason, "refused": refused})})
