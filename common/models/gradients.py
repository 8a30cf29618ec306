"""Gradients by the frozen weights of a base, which itself has none: for starts that have to see them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from common.models.adapted import LoraModel
from common.tasks import Example, Task


def gradients(model: LoraModel, task: Task, examples: Sequence[Example]) -> dict[str, Tensor]:
    """The gradient of the mean loss by the frozen weight of every adapted layer: ``d_out x d_in``, on the CPU.

    The adapter must be trainable, so that a gradient reaches its layer; each layer's is the sum over positions of
    what leaves it backwards times what went in.
    """
    model.network.eval()
    model.train_only([key for key in model.keys if key.part in ("R", "B")])
    sums = {layer: torch.zeros(shape.d_out, shape.d_in) for layer, shape in model.spec.layers.items()}

    def watch(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def watched(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            entered = arguments[0].detach().flatten(0, -2).float()

            def add(left: Tensor) -> None:
                sums[layer] += (left.flatten(0, -2).float().T @ entered).cpu() / len(examples)

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return watched

    hooks = [module.register_forward_hook(watch(layer)) for layer, module in model.layers.items()]
    try:
        for example in examples:
            batch = task.collate([example], model.pad)
            task.loss(model.outputs(batch)).backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
        model.network.zero_grad(set_to_none=True)
    return sums
