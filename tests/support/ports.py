"""Ports of this machine that nobody listens at."""

import socket


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_ports(count: int) -> int:
    """The first of as many free ports in a row."""
    while True:
        first = free_port()
        if not any(listens(port) for port in range(first, first + count)):
            return first


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
