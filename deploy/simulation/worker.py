"""A process that answers for nodes of a simulation, until its starter closes the link.

    python -m deploy.simulation.worker DESCRIPTOR

For each message, one after the other, come the log of its run, the node's context and the message; the context goes
back with the reply. What was imported, loaded and tokenised for one message serves the next.
"""

import os
import socket
import sys
import traceback
from contextlib import suppress
from importlib import import_module

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from client_app import simulation
from client_app.app import app
from client_app.link import packed, pose, receive, send, unpacked


def serve(link: socket.socket) -> None:
    """Answer until nobody is left to answer."""
    simulation.declare()
    import_module("client_app.session")  # what does the work, before there is any
    with suppress(ConnectionError):
        while True:
            _speak_to(receive(link))
            for frame in _answered(receive(link), receive(link)):
                send(link, frame)


def _speak_to(log: bytes) -> None:
    """Have all that this process says from now on in the log of a run."""
    with open(log, "ab") as said:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(said.fileno(), stream.fileno())


def _answered(context: bytes, message: bytes) -> tuple[bytes, bytes]:
    told, asked = unpacked(context, message)
    pose(told.run_id, told.node_id)
    try:
        reply = app(asked, told)
    except Exception as error:  # a boundary: what the app raises is a reply, as Flower makes it one
        traceback.print_exc()
        reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=asked)
    return packed(told, reply)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
