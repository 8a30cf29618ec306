"""What goes into the engine and into the mechanism, as the node's own functions are called; nothing is changed."""

import importlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from common.privacy.gaussian import Gaussian
from common.tasks import Example
from tests.attacks.hostile import Node


def units(node: Node, run: Mapping[str, Any] | None = None) -> Counter[Any] | None:
    """The units that a node would train on, as many times as it has them; None where it does not train."""

    class Caught(BaseException):
        """Goes past every ``except Exception``."""

    def catch(model: Any, keys: Any, task: Any, data: Sequence[Any], *others: Any, **named: Any) -> None:
        raise Caught(data)

    with _everywhere("train_privately", catch):
        try:
            node.ask("train", run)
        except Caught as caught:
            return Counter(_unit(unit) for unit in caught.args[0])
    return None


@contextmanager
def sums() -> Iterator[list[tuple[Gaussian, torch.Tensor]]]:
    """The mechanism and the sum of every release that is made inside, before its noise."""
    found: list[tuple[Gaussian, torch.Tensor]] = []
    release = Gaussian.release

    def watch(self: Gaussian, total: Mapping[Any, torch.Tensor]) -> Any:
        found.append((self, torch.cat([tensor.detach().double().flatten() for tensor in total.values()])))
        return release(self, total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gaussian, "release", watch)
        yield found


@contextmanager
def _everywhere(name: str, value: Any) -> Iterator[None]:
    """A function of the node's replaced in every module that knows it."""
    importlib.import_module("client_app.session")  # the first message would
    with pytest.MonkeyPatch.context() as patch:
        found = [m for key, m in list(sys.modules.items()) if key.startswith("client_app.") and hasattr(m, name)]
        assert found, f"no module of the node has {name}"
        for module in found:
            patch.setattr(module, name, value)
        yield


def _unit(unit: Any) -> tuple[Any, ...]:
    examples = [unit] if isinstance(unit, Example) else unit
    return tuple(repr(example) for example in examples)
