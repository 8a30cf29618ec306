"""The state of a node's optimizer as tensors, to be kept from round to round.

This is ``train.optimizer-state``, for any torch optimizer: a slot of a parameter's state, ``exp_avg`` say, is the
tensor ``slot/layer:part``; a whole number is one without dimensions, of int64. Each round has a file of it, as of
whatever a node keeps (:mod:`client_app.memory`), so that a round that is asked for again starts from the state of then.

It never leaves the node, but what does leave depends on it, and so on the data of earlier rounds. No promise of a
private run is weaker for it. Under ``example`` the state is a function of gradients that were clipped, noised and
charged, and whatever follows from those is post-processing. In the two modes of whole changes the change is clipped
to C after training, wherever that started, so it can move by as much as is noised for and no more; the rounds compose
adaptively, as they do over the states that the coordinator sends. Nothing of it passes from one privacy mode to
another.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.adapter.values import Key, Tensors


def taken(optimizer: torch.optim.Optimizer, parameters: Mapping[Key, nn.Parameter]) -> Tensors:
    """A copy of an optimizer's state of these parameters, on the CPU. Raises :class:`TypeError` for other values."""
    return {
        Key(f"{slot}/{name.layer}", name.part): _tensor(slot, value)
        for name, parameter in parameters.items()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def put(optimizer: torch.optim.Optimizer, parameters: Mapping[Key, nn.Parameter], kept: Tensors) -> None:
    """Give a fresh optimizer the state that was ``kept`` of its parameters; one of another shape begins anew."""
    slots: dict[Key, dict[str, Tensor]] = {}
    for key, tensor in kept.items():
        slot, _, layer = key.layer.partition("/")
        slots.setdefault(Key(layer, key.part), {})[slot] = tensor
    for name, parameter in parameters.items():
        state = slots.get(name, {})
        if any(_alike(tensor, parameter) for tensor in state.values()):
            # Not by torch's ``load_state_dict``, which rounds to the parameter's type, and wants slots of Adam's.
            optimizer.state[parameter] = {slot: _value(tensor, parameter) for slot, tensor in state.items()}


def _alike(tensor: Tensor, parameter: nn.Parameter) -> bool:
    """Whether a tensor is of a parameter's shape, as it is or turned."""
    return sorted(tensor.shape) == sorted(parameter.shape)


def _tensor(slot: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if type(value) is int:
        return torch.tensor(value)
    raise TypeError(f"an optimizer's state that cannot be kept: {slot}, a {type(value).__name__}")


def _value(tensor: Tensor, parameter: nn.Parameter) -> Any:
    """What stands in the state: numbers as they were, on the CPU, and the rest beside its parameter."""
    if not tensor.ndim:
        return int(tensor) if tensor.dtype == torch.int64 else tensor.clone()
    return tensor.to(parameter.device, copy=True)
