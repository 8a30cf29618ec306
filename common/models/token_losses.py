"""The losses of a language model's labelled tokens, without the logits of all the others.

Logits are the largest tensor of a step: T tokens by V words, in float32, and their gradient beside them. Here the
model's head sees only the hidden states h before which a label stands, some at a time. As each token's loss depends on
its own hidden state alone,

    l_t = CE(head(h_t), y_t)        dL/dh_t = (dL/dl_t) (dl_t/dh_t)

the last factor is found as the chunk goes by, and its logits are let go of: one pass of the head either way.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutputWithPast

from common.models import parts
from common.models.agreement import agree
from common.tasks import Batch, Output
from common.tasks.task import IGNORED

LOGITS = 2**23
"""How many logits are computed at once; in float32, 32 MiB."""

TOKENS = 8
"""The length of the made-up text that the two ways are compared on."""


class TokenLosses:
    """A function from a batch to the loss of each labelled token, for one causal language model.

    Whatever stands between the last hidden state and the logits, the model's own code computes it: its forward pass is
    run with the body left out, or in a model that sees images what of its body is a language model. Where that gives
    other logits than the whole pass, the whole pass is what is used.
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        self._body: Any = getattr(network, network.base_model_prefix, None)
        self._left_out: Any = parts.language_model(network) if parts.sees(network) else self._body
        self._vocabulary: int = network.config.get_text_config().vocab_size
        self._apart = self._body is not None and network.device.type != "meta" and self._same()

    def __call__(self, batch: Batch) -> Output:
        """The losses of a batch of ``N x T`` tokens; where no gradient is wanted, also which were the likeliest."""
        device = self._network.device
        rows, before = (batch["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
        chosen = batch["labels"][rows, before + 1].to(device)
        rows, before = rows.to(device), before.to(device)
        labels = batch["labels"].to(device)
        inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        if self._apart:
            hidden = self._body(**inputs, use_cache=False).last_hidden_state[rows, before]
            head: Callable[[Tensor], Tensor] = self._head
        else:
            hidden, head = self._network(**inputs, use_cache=False).logits[rows, before], _as_it_is
        size = max(1, LOGITS // self._vocabulary)
        losses, right = _Losses.apply(hidden, chosen, head, size)  # type: ignore[no-untyped-call]
        place = rows, before + 1
        return Output(
            values=torch.zeros(labels.shape, device=device).index_put(place, losses),
            labels=labels,
            right=torch.zeros_like(labels, dtype=torch.bool).index_put(place, right),
        )

    def _head(self, hidden: Tensor) -> Tensor:
        """The logits of ``L x d`` hidden states: ``L x V``."""
        with _left_out(self._left_out, hidden[None]):
            words = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            logits: Tensor = self._network(input_ids=words, use_cache=False).logits
        return logits[0]

    def _same(self) -> bool:
        """Whether a made-up text has the same logits either way."""
        text = {"input_ids": torch.arange(TOKENS, device=self._network.device)[None] % self._vocabulary}
        text["attention_mask"] = torch.ones_like(text["input_ids"])

        def both() -> tuple[Tensor, Tensor]:
            hidden = self._body(**text, use_cache=False).last_hidden_state[0]
            return self._head(hidden), self._network(**text, use_cache=False).logits[0]

        return agree(self._network, both)


class _Losses(torch.autograd.Function):
    """Cross-entropies of ``L`` tokens from their hidden states, with the gradients that a backward pass will want."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], size: int
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        losses, right, gradients = [], [], list[Tensor]()
        for states, words in zip(torch.split(hidden, size), torch.split(labels, size), strict=True):
            with torch.set_grad_enabled(wanted):
                states = states.detach().requires_grad_(wanted)
                logits = head(states).float()
                each = cross_entropy(logits, words, reduction="none")
            losses.append(each.detach())
            right.append(torch.zeros_like(words, dtype=torch.bool) if wanted else logits.argmax(-1) == words)
            if wanted:
                gradients += torch.autograd.grad(each, states, torch.ones_like(each))
        ctx.save_for_backward(*(torch.cat(gradients),) if wanted and gradients else ())
        ctx.mark_non_differentiable(found := torch.cat(right))
        return torch.cat(losses), found

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return outer[0][:, None].to(gradients.dtype) * gradients, None, None, None


@contextmanager
def _left_out(body: Any, hidden: Tensor) -> Iterator[None]:
    """While it lasts, ``body`` is asked nothing, and answers ``hidden``."""
    own = vars(body).get("forward")
    body.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden)
    try:
        yield
    finally:
        del body.forward
        if own is not None:
            body.forward = own


def _as_it_is(logits: Tensor) -> Tensor:
    return logits
