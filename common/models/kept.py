"""The base model that a process keeps: loaded once, for one adapter after another."""

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, TypeVar

from peft.tuners.lora import LoraLayer
from torch import nn

from common.config.run import ModelConfig
from common.models.base import load
from common.models.placement import find_devices

Worn = TypeVar("Worn")


class Kept:
    """A loaded base. What an adapter's life has left in its buffers is undone; the values of a head are not."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._worn: tuple[Hashable, Any] | None = None
        # All names of a buffer that several modules share.
        self._buffers = {name: buffer.clone() for name, buffer in network.named_buffers(remove_duplicate=False)}

    def wearing(self, adapter: Hashable, put_on: Callable[[nn.Module], Worn]) -> Worn:
        """What ``put_on`` made of the bare network for this ``adapter``, while it wears no other."""
        if self._worn is None or self._worn[0] != adapter:
            # Forgotten first: where the next one cannot be put on, the one before is off all the same.
            self._worn = None
            self._worn = adapter, put_on(self._bare())
        worn: Worn = self._worn[1]
        return worn

    def _bare(self) -> nn.Module:
        """The network without the adapter that it has worn until now, which is of no use from then on."""
        for name, module in list(self._network.named_modules()):
            if isinstance(module, LoraLayer):
                self._network.set_submodule(name, module.get_base_layer())
        # By this attribute PEFT tells a model that has an adapter already.
        vars(self._network).pop("peft_config", None)
        for name, buffer in self._buffers.items():
            owner, _, own = name.rpartition(".")
            setattr(self._network.get_submodule(owner), own, buffer.clone())
        return self._network


@lru_cache(maxsize=1)
def base(model: ModelConfig, classes: int | None, device: str, mode: str) -> Kept:
    """The base of the last model that was asked for. ``mode`` is the privacy mode of who asks.

    Not from one mode to another: some models keep in buffers what they have seen.
    """
    return Kept(load(model, classes, *find_devices(device)))
