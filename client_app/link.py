"""Contexts and messages between two processes of one machine.

They cross as Flower's own protocol buffers, each after its length; nothing is unpickled.
"""

import socket
import struct

from flwr.app import Context, Message
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.supercore.task_identity import TaskIdentity

LENGTH = struct.Struct(">Q")


def pose(run_id: int, node_id: int) -> None:
    """Let this process make messages, which Flower does only in an app that it has started."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, node_id


def packed(context: Context, message: Message) -> tuple[bytes, bytes]:
    """A node's context and a message as they cross. Raises :class:`ValueError` for more than one buffer holds."""
    return context_to_proto(context).SerializeToString(), message_to_proto(message).SerializeToString()


def unpacked(context: bytes, message: bytes) -> tuple[Context, Message]:
    """What :func:`packed` has packed."""
    return context_from_proto(ContextProto.FromString(context)), message_from_proto(MessageProto.FromString(message))


def send(link: socket.socket, frame: bytes) -> None:
    """Send one frame. Raises :class:`ConnectionError` where the other side has gone."""
    link.sendall(LENGTH.pack(len(frame)))
    link.sendall(frame)


def receive(link: socket.socket) -> bytes:
    """One frame. Raises :class:`ConnectionError` where the other side has gone."""
    (size,) = LENGTH.unpack(_exactly(link, LENGTH.size))
    return _exactly(link, size)


def _exactly(link: socket.socket, size: int) -> bytes:
    frame = bytearray()
    while len(frame) < size:
        if not (chunk := link.recv(min(size - len(frame), 2**20))):
            raise ConnectionResetError
        frame += chunk
    return bytes(frame)
