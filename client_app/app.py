"""The ClientApp: one handler for each kind of message.

Flower imports this module wherever it only has to know that the app exists, so the libraries that do the work are
imported by the first message.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client_app import worker
from client_app.answer import answer

app = ClientApp()


@app.query()
def roll_call(message: Message, context: Context) -> Message:
    """Who is here."""
    return _answer(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training."""
    return _answer(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the received state on this node's held-out examples."""
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    """Here, or by the worker that keeps the node's model warm."""
    return answer(message, context, lambda node: worker.hand_over(message, context, node.state, node.warm))
