"""The program of a child of a node's process (:mod:`client_app.children`): it computes its share of every step.

python -m client_app.child SOCKET DEVICE RANK SIZE STORE
"""

import json
import os
import random
import select
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors.torch import load

from client_app.children import BEGIN, DONE, LOAD
from client_app.crossing import unpacked
from client_app.group import Group
from client_app.link import receive, send
from client_app.privacy import private_work
from client_app.process import model_of, prepare, recipe_of
from client_app.shares import Work
from client_app.training import Turn, plain_work
from common.adapter.values import OFFSET, Key, State
from common.config.node import NodeConfig
from common.models import lengths
from common.models.adapted import LoraModel
from strategies import Recipe


def serve(link: socket.socket, group: Group, device: str, rank: int) -> None:
    """Do what one order after the other says, until the parent has gone."""
    with suppress(ConnectionError), ExitStack() as begun:
        while True:
            order, content = receive(link), json.loads(receive(link))
            if order == LOAD:
                begun.close()
                recipe = recipe_of(content["run"])
                model = model_of(recipe, NodeConfig.from_flower({"device": device, **content["node"]}))
            elif order == BEGIN:
                begun.close()
                _install(model, content, receive(link))
                work = begun.enter_context(_begun(model, recipe, content["turn"], receive(link), rank))
            else:
                group.spread(work.parameters)
                sums = work.compute(content)
                send(link, DONE)
                group.add_up(work.parameters, sums)
                continue
            send(link, DONE)


def _install(model: LoraModel, state: Mapping[str, Any], tensors: bytes) -> None:
    """Let the model be the parent's."""
    named = {Key.parse(name): tensor for name, tensor in load(tensors).items()}
    offset = {key: tensor for key, tensor in named.items() if key.part in OFFSET}
    adapter = {key: tensor for key, tensor in named.items() if key not in offset}
    model.resize(State(adapter, state["scale"]).ranks)
    model.install(adapter, state["scale"], offset)


@contextmanager
def _begun(model: LoraModel, recipe: Recipe, turn: Mapping[str, Any], data: bytes, rank: int) -> Iterator[Work]:
    """The work of a round, while it lasts."""
    keys = [Key.parse(name) for name in turn["keys"]]
    own = Turn(turn["number"], keys, turn["blocks"], f"{turn['seed']}/{rank}")
    units = unpacked(data)
    task = lengths.widest(recipe.config)
    model.network.train(recipe.gradient.training)
    if recipe.config.privacy.per_example:
        with private_work(model, recipe, task, units, own) as work:
            yield work
    else:
        # Its own: with the parent's seed, dropout would leave out the same of another example.
        torch.manual_seed(random.Random(own.seed).getrandbits(63))
        (examples,) = units
        yield plain_work(model, recipe, task.weighed(examples), examples, own)


def _end_with_parent(link: socket.socket) -> None:
    """End this process when the other end of ``link`` has gone, even in the middle of a step."""
    hung_up = select.poll()
    hung_up.register(link, 0)
    hung_up.poll()
    os._exit(0)


def main(descriptor: str, device: str, rank: str, size: str, store: str) -> None:
    """Meet the other processes, and serve."""
    link = socket.socket(fileno=int(descriptor))
    Thread(target=_end_with_parent, args=(link,), daemon=True).start()
    prepare()
    send(link, DONE)
    group = Group(Path(store), int(rank), int(size))
    send(link, DONE)
    serve(link, group, device, int(rank))


if __name__ == "__main__":
    main(*sys.argv[1:])
