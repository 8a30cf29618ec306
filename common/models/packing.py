"""Batches without padding: a model's blocks see the tokens of all texts, concatenated.

Most of a step is spent in linear layers, which do not care whose token a row is. So between the first block and the
last, the N x T x d hidden states of a padded batch are the S x d of its tokens. Attention alone has to know the texts
apart: there, the padded form comes back, with the mask that the model made for it, and with it positions, sliding
windows and whatever else a mask can say. What stands before the blocks and after them, embeddings, poolers and heads,
never notices; nor does what sees the images of a model that has any, where a language model has the blocks.

This takes a model that attends by Transformers' ``sdpa``. Whether one does, and gives what it gives padded, is tried on
made-up texts when it is loaded; the others are padded as ever.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from common.models import parts
from common.models.agreement import agree

LENGTHS = (3, 8, 5)
"""Of the made-up texts, in tokens."""


class Layout:
    """Where the S tokens of a padded batch stand in its N x T places."""

    def __init__(self, mask: Tensor, device: torch.device) -> None:
        self.padded = tuple(mask.shape)
        self.places = tuple(place.to(device) for place in mask.nonzero(as_tuple=True))

    @property
    def packed(self) -> tuple[int, int]:
        """The first two sizes of what is packed: 1 and S."""
        return 1, len(self.places[0])

    def pack(self, padded: Tensor) -> Tensor:
        """``1 x S x ...`` of ``N x T x ...``; what all texts share, ``1 x T x ...``, is taken for each."""
        return padded.expand(self.padded[0], *padded.shape[1:])[self.places][None]

    def unpack(self, packed: Tensor) -> Tensor:
        """``N x T x ...`` of ``1 x S x ...``, with zeros for padding; whatever is not packed, as it is."""
        if packed.shape[:2] != self.packed:
            return packed
        return packed.new_zeros(*self.padded, *packed.shape[2:]).index_put(self.places, packed[0])


class Packing:
    """What packs and unpacks around one model's blocks, within :meth:`on` alone."""

    def __init__(self, network: nn.Module) -> None:
        self._network: Any = network
        self._blocks = blocks(parts.language_model(network))
        self._device = next(network.parameters()).device
        self.works = bool(self._blocks) and self._device.type != "meta" and self._same()

    @contextmanager
    def on(self, mask: Tensor) -> Iterator[Layout | None]:
        """While it lasts, the blocks see only the tokens that ``mask`` (N x T) keeps; None where nothing is gained."""
        if not self.works or bool(mask.all()):
            yield None
            return
        with self._packed(mask) as layout:
            yield layout

    @contextmanager
    def _packed(self, mask: Tensor) -> Iterator[Layout]:
        layout = Layout(mask, self._device)
        hooks = [block.register_forward_pre_hook(partial(_enter, layout), with_kwargs=True) for block in self._blocks]
        hooks.append(self._blocks[-1].register_forward_hook(partial(_leave, layout)))
        try:
            yield layout
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def off(self) -> Iterator[None]:
        """While it lasts, everything is padded."""
        works, self.works = self.works, False
        try:
            yield
        finally:
            self.works = works

    def _same(self) -> bool:
        """Whether made-up texts come out of this model packed as they do padded."""
        mask = torch.tensor([[1] * length + [0] * (max(LENGTHS) - length) for length in LENGTHS])
        config = self._network.config.get_text_config()
        tokens = torch.arange(1, 1 + mask.numel()).view_as(mask) % config.vocab_size
        tokens[mask == 0] = getattr(config, "pad_token_id", None) or 0
        batch = {"input_ids": tokens.to(self._device), "attention_mask": mask.to(self._device)}

        def both() -> tuple[Tensor, Tensor]:
            padded = self._network(**batch).logits
            with self._packed(mask):
                packed = self._network(**batch).logits
            # Of a language model, what it says of padding is of no use.
            return (packed[mask.bool()], padded[mask.bool()]) if packed.dim() == 3 else (packed, padded)

        return agree(self._network, both)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The model's blocks, in their order: of its lists of modules, the largest that is in no other."""
    lists = {name: module for name, module in network.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return list(max(outer, key=lambda each: sum(p.numel() for p in each.parameters()), default=()))


def _enter(
    layout: Layout, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pack what goes into a block, and let its attention mask tell the layout."""
    masks = [each for each in (*arguments, *named.values()) if isinstance(each, Tensor) and each.dim() == 4]
    if not masks:
        raise ValueError("a block without an attention mask cannot tell packed texts apart")
    for mask in masks:
        mask.packed_as = layout  # type: ignore[attr-defined]
    packed = tuple(_packed(each, layout) for each in arguments)
    return packed, {name: _packed(each, layout) for name, each in named.items()}


def _leave(layout: Layout, _: nn.Module, __: Any, output: Any) -> Any:
    return layout.unpack(output) if isinstance(output, Tensor) else (layout.unpack(output[0]), *output[1:])


def _packed(value: Any, layout: Layout) -> Any:
    """What goes into a block, packed where it has a place for each token: hidden states, rotations, positions."""
    if isinstance(value, tuple):
        return tuple(_packed(each, layout) for each in value)
    count, length = layout.padded
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != length or value.shape[0] not in (1, count):
        return value
    return layout.pack(value)


_padded_attention: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, Any]:
    """Transformers' ``sdpa``; where the mask tells a layout, over the padded form of ``1 x heads x S x d_head``."""
    layout: Layout | None = getattr(attention_mask, "packed_as", None)
    if layout is None:
        return _padded_attention(module, query, key, value, attention_mask, **named)  # type: ignore[no-any-return]
    query, key, value = (layout.unpack(each.transpose(1, 2)).transpose(1, 2) for each in (query, key, value))
    output, weights = _padded_attention(module, query, key, value, attention_mask, **named)
    return layout.pack(output), weights


AttentionInterface.register("sdpa", _attention)


def stay_uncompiled() -> None:
    """Keep the attention of packed texts out of what is compiled: each batch has a layout of its own."""
    AttentionInterface.register("sdpa", torch.compiler.disable(_attention))  # type: ignore[no-untyped-call]
