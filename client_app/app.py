"""The ClientApp: one handler for each kind of message.

Flower imports this module wherever it only has to know that the app exists, so the libraries that do the work are
imported by the first message.
"""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client_app import worker
from common.config import NodeConfig
from common.error import BouquetError

if TYPE_CHECKING:
    from client_app.session import Session

# Of a defect's traceback, the innermost frames travel.
FRAMES = 6

app = ClientApp()


@app.query()
def roll_call(message: Message, context: Context) -> Message:
    """Who is here."""
    return _answer(message, context, lambda session: session.answer_roll_call())


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training."""
    return _answer(message, context, lambda session: session.train(message))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the received state on this node's held-out examples."""
    return _answer(message, context, lambda session: session.evaluate(message))


def _answer(message: Message, context: Context, work: Callable[["Session"], RecordDict]) -> Message:
    """The reply to a message. An error is a reply too, so that the coordinator can say why a node failed."""
    try:
        node = NodeConfig.from_flower(context.node_config)
        if node.warm and not worker.inside:
            return worker.hand_over(message, context, Path(node.state_directory), node.warm)
        from client_app.session import Session

        return Message(work(Session(context)), reply_to=message)
    except BouquetError as error:
        reason = str(error)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error, limit=-FRAMES))}"
    print(reason, file=sys.stderr)
    return Message(RecordDict({"failure": ConfigRecord({"reason": reason})}), reply_to=message)
