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
    if not kept:
        return
    slots: dict[Key, dict[str, Any]] = {}
    for key, tensor in kept.items():
        slot, _, layer = key.layer.partition("/")
        slots.setdefault(Key(layer, key.part), {})[slot] = tensor
    names = {id(parameter): name for name, parameter in parameters.items()}
    fresh = optimizer.state_dict()
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in fresh["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, own, strict=True):
        state = slots.get(names[id(parameter)], {})
        if any(tensor.shape == parameter.shape for tensor in state.values()):
            fresh["state"][number] = {slot: _value(tensor) for slot, tensor in state.items()}
    # Torch's and bitsandbytes' own way, which knows what of a state lies beside its parameter, and in which type.
    optimizer.load_state_dict(fresh)


def _tensor(slot: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if type(value) is int:
        return torch.tensor(value)
    raise TypeError(f"an optimizer's state that cannot be kept: {slot}, a {type(value).__name__}")


def _value(tensor: Tensor) -> Any:
    return int(tensor) if tensor.dtype == torch.int64 and not tensor.ndim else tensor.clone()
