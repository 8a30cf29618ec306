"""Tensors between the processes of one node, over gloo: rank 0 has what is trained, and gets what all have computed.

Gloo listens on the loopback interface alone, on a port of the operating system's; who listens where stands in a file of
a folder that only their user can open. Tensors cross by way of the CPU, so that every kind of device can take part: an
adapter's are small.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import FileStore, ProcessGroupGloo  # type: ignore[attr-defined]

from client_app.shares import Sums

PATIENCE = timedelta(minutes=5)
"""How long rank 0 waits for a process that is there, and ready, and does not come."""

WITHOUT_END = timedelta(days=365)
"""How long the others wait for rank 0, whose share of a step may be the longer one; if it ends, so do they."""


class Group:
    """A place among ``size`` processes, which have met when it has been made.

    Raises :class:`ConnectionError` if they do not, and where one of them is lost later.
    """

    def __init__(self, store: Path, rank: int, size: int) -> None:
        # Otherwise gloo would listen on the network that the host's name leads to.
        os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        self._rank = rank
        with _lost():
            # Not torch's default group, which whatever else this process runs would take for its own.
            patience = WITHOUT_END if rank else PATIENCE
            self._gloo: Any = ProcessGroupGloo(FileStore(str(store), size), rank, size, patience)

    @torch.no_grad()
    def spread(self, parameters: Sequence[Tensor]) -> None:
        """Give the parameters of every process the values that they have in rank 0, which are float32 at most."""
        vector = torch.cat([parameter.float().cpu().flatten() for parameter in parameters])
        with _lost():
            self._gloo.broadcast(vector, 0).wait()
        if self._rank:
            for parameter, values in zip(parameters, _parts(vector, parameters), strict=True):
                parameter.copy_(values)

    def add_up(self, parameters: Sequence[Tensor], own: Sums) -> Sums:
        """The sums over all processes, in float64 on the CPU; in rank 0, that is: nobody else is told."""
        found = [float(gradient is not None) for gradient in own.gradients]
        numbers = torch.tensor([*found, *own.figures], dtype=torch.float64)
        gradients = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, own.gradients, strict=True))
        vector = torch.cat([numbers, *(gradient.detach().double().cpu().flatten() for gradient in gradients)])
        with _lost():
            self._gloo.reduce(vector, 0).wait()
        summed = _parts(vector[len(numbers) :], parameters)
        there, figures = vector[: len(found)].tolist(), vector[len(found) : len(numbers)].tolist()
        return Sums([value if anywhere else None for value, anywhere in zip(summed, there, strict=True)], figures)


def _parts(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """What stands in a vector one behind the other: a tensor of each parameter's shape."""
    parts = torch.split(vector, [parameter.numel() for parameter in parameters])
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]


@contextmanager
def _lost() -> Iterator[None]:
    """Raise :class:`ConnectionError` where gloo loses a process, as a socket does."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(str(error)) from error
