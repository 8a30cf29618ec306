"""What a start may have to see of a base model: its frozen weights, what goes into them, gradients by them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from common.models.adapted import LoraModel
from common.tasks import Example, Task

SPARE = 4
"""Of what goes into a layer, so many times the rank of its directions are kept from example to example."""

Look = Callable[[str, Tensor, Tensor], None]
"""Takes a layer's name, what goes into it (n x d_in), and its output as the network goes on with it."""


def weight(model: LoraModel, layer: str) -> Tensor:
    """The frozen weight of an adapted layer, unpacked where it is quantised: ``d_out x d_in``, on the CPU."""
    module = model.layers[layer]
    unpacked: Tensor = dequantize_module_weight(module.get_base_layer()).detach().float().cpu()
    return unpacked.T if module.fan_in_fan_out else unpacked


def gradients(model: LoraModel, task: Task, examples: Sequence[Example]) -> dict[str, Tensor]:
    """The gradient of the mean loss by the frozen weight of every adapted layer: ``d_out x d_in``, on the CPU.

    The adapter must be trainable, so that a gradient reaches its layer; each layer's is the sum over positions of
    what leaves it backwards times what went in.
    """
    model.train_only([key for key in model.keys if key.part in model.spec.structure.trained])
    sums = {layer: torch.zeros(shape.d_out, shape.d_in) for layer, shape in model.spec.layers.items()}

    def look(layer: str, entered: Tensor, output: Tensor) -> None:
        def add(left: Tensor) -> None:
            sums[layer] += (left.flatten(0, -2).float().T @ entered).cpu() / len(examples)

        output.register_hook(add)  # type: ignore[no-untyped-call]

    with _watched(model, look):
        for example in examples:
            task.loss(model.outputs(task.collate([example], model.pad))).backward()  # type: ignore[no-untyped-call]
    model.network.zero_grad(set_to_none=True)
    return sums


@torch.no_grad()
def inputs(model: LoraModel, task: Task, examples: Sequence[Example]) -> dict[str, Tensor]:
    """The main directions of what goes into every adapted layer: rows ``S Vh`` of its singular values and vectors.

    Each is ``k x d_in``, with at most :data:`SPARE` times the rank of rows, found an example at a time.
    """
    found = {layer: torch.zeros(0, shape.d_in) for layer, shape in model.spec.layers.items()}

    def look(layer: str, entered: Tensor, output: Tensor) -> None:
        _, singular, vh = torch.linalg.svd(torch.cat([found[layer], entered.cpu()]), full_matrices=False)
        found[layer] = (singular[:, None] * vh)[: SPARE * model.spec.rank]

    with _watched(model, look):
        for example in examples:
            model.outputs(task.collate([example], model.pad))
    return found


@contextmanager
def _watched(model: LoraModel, look: Look) -> Iterator[None]:
    """While it lasts, ``look`` sees what every adapted layer computes."""

    def watch(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def watched(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            look(layer, arguments[0].detach().flatten(0, -2).float(), output)

        return watched

    model.network.eval()
    hooks = [module.register_forward_hook(watch(layer)) for layer, module in model.layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
