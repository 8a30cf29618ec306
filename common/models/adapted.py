"""A base model with its adapter: injecting, reading and writing factors, scoring.

All that trains by PEFT is here and nowhere else, so that the file is a long one.

The base is never written to. The adapter is PEFT's ``default``; the frozen offset is a second PEFT adapter on top.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import tasks
from common.adapter import ranks
from common.adapter.lora import Lora
from common.adapter.spec import Spec
from common.adapter.structure import Pair, Structure
from common.adapter.values import HEAD, Key, LayerShape, Tensors, check_shapes
from common.config.run import LoraConfig, ModelConfig, TaskConfig
from common.error import BouquetError
from common.models import base, head, kept, packing, parts, targets
from common.models.packing import Packing
from common.models.token_losses import TokenLosses
from common.tasks import Batch, Example, Output, Score, Task

PREFIX = "base_model.model."
PLAIN = Lora()
PARTS = {"weight": "W", "bias": "b"}


def describe(model: ModelConfig, lora: LoraConfig, task: TaskConfig, structure: Structure = PLAIN) -> Spec:
    """The adapter's shapes, worked out on the meta device: no weight is loaded."""
    return LoraModel(base.skeleton(model, tasks.classes(task)), lora, structure).spec


def load(
    model: ModelConfig,
    lora: LoraConfig,
    task: TaskConfig,
    device: str,
    structure: Structure = PLAIN,
    mode: str = "none",
) -> "LoraModel":
    """The base model in its quantised form, with a LoRA injected; kept until another one is asked for.

    The base itself is kept for that one too, within a privacy ``mode``: the model that had it before is then of no use.
    """
    base_model = kept.base(model, tasks.classes(task), device, mode)
    return base_model.wearing((lora, structure), lambda network: LoraModel(network, lora, structure))


class LoraModel:
    """A frozen base with one trained adapter, one frozen offset, and a head where the task has one."""

    spec: Spec

    def __init__(self, network: nn.Module, lora: LoraConfig, structure: Structure = PLAIN) -> None:
        heads = head.find(network)
        self._targets = targets.find(network, lora.targets, heads)
        self._transposed = targets.transposed(network)
        self.network: Any = peft.PeftModel(network, self._peft_config(lora.rank, lora.dropout))
        self._find_adapter(network, heads, lora.rank, lora.scale, structure)
        if lora.rank_pattern:
            self.spec = replace(self.spec, ranks=ranks.by_layer(lora.rank_pattern, self._layers, lora.rank))
            self._renew()

    def _find_adapter(
        self, network: nn.Module, heads: Sequence[str], rank: int, scale: float, structure: Structure
    ) -> None:
        """Get to know the adapted layers and the ``heads`` of a base that PEFT has adapted."""
        self._layers: dict[str, Any] = {
            name.removeprefix(PREFIX): module
            for name, module in self.network.named_modules()
            if isinstance(module, LoraLayer)
        }
        self._head: dict[Key, nn.Parameter] = dict(_head_parameters(network, heads))
        self.spec = Spec(
            layers={
                layer: LayerShape(module.lora_B["default"].out_features, module.lora_A["default"].in_features)
                for layer, module in self._layers.items()
            },
            head={key: tuple(parameter.shape) for key, parameter in self._head.items()},
            rank=rank,
            scale=scale,
            structure=structure,
        )
        language = parts.within(network, parts.language_model(network))
        self.seeing = [layer for layer in self._layers if not layer.startswith(language)]
        """The adapted layers that see images: those beside the language model."""
        self._token_losses = TokenLosses(network) if targets.output_layer(network) is not None else None
        self._packing = Packing(network)
        self._inject()
        self._rescale(scale)

    @property
    def layers(self) -> dict[str, Any]:
        """PEFT's adapted layers, by their full names."""
        return self._layers

    @property
    def device(self) -> torch.device:
        """Where batches come in and outputs go out; of a model that is split, the first device."""
        device: torch.device = next(self.network.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What the base computes in."""
        dtype: torch.dtype = self.network.config.dtype
        return dtype

    @property
    def pad(self) -> int:
        """The padding token."""
        return int(getattr(self.network.config.get_text_config(), "pad_token_id", None) or 0)

    def parameters(self, key: Key) -> list[nn.Parameter]:
        """The parameters that hold one tensor of the adapter or the head, one below the other: a core's blocks."""
        if key.part in HEAD:
            return [self._head[key]]
        return self._parameters[key]

    def pairs(self) -> list[Pair]:
        """The factors of every layer, with the scale that they count with."""
        return [
            Pair(b=self._parameters[Key(layer, "B")][0], a=self._parameters[Key(layer, "A")][0], scale=self._scale)
            for layer in self._layers
        ]

    def step(self, draw: int) -> None:
        """Prepare every layer for a step of training, by a random number."""
        for module in self._layers.values():
            self.spec.structure.step(module, draw)

    def live(self, keys: Sequence[Key]) -> Tensors:
        """The tensors themselves, on one device, for a loss term over them."""
        return {key: torch.cat(list(self.parameters(key))).to(self.device) for key in keys}

    def resize(self, ranks: Mapping[str, int]) -> None:
        """Give the layers so many slots, where they have others; what they held is gone."""
        if any(rank != self.spec.rank_of(layer) for layer, rank in ranks.items()):
            self.spec = replace(self.spec, rank=max(ranks.values()), ranks=dict(ranks))
            self._renew()

    def _renew(self) -> None:
        """Give each layer as many slots as the adapter has there now."""
        for layer, module in self._layers.items():
            (d_out, d_in), device = self.spec.layers[layer], module.lora_A["default"].weight.device
            module.lora_A["default"] = nn.Linear(d_in, self.spec.rank_of(layer), bias=False, device=device)
            module.lora_B["default"] = nn.Linear(self.spec.rank_of(layer), d_out, bias=False, device=device)
        self._inject()

    @property
    def keys(self) -> list[Key]:
        """Every tensor of the adapter and the head, in the model's order."""
        return [*self.spec.factor_shapes(), *self.spec.head]

    @torch.no_grad()
    def install(self, tensors: Tensors, scale: float, offset: Tensors) -> None:
        """Start from ``tensors`` (all of :attr:`keys`) at ``scale``, over ``offset``. Idempotent.

        Raises :class:`BouquetError` where names or shapes are not those of this model.
        """
        expected = self.spec.factor_shapes() | dict(self.spec.head)
        check_shapes(tensors, expected, "the state does not fit this machine's model")
        for key in expected:
            parameters = self.parameters(key)
            for parameter, part in zip(parameters, tensors[key].chunk(len(parameters)), strict=True):
                parameter.copy_(part)
        self._rescale(scale)
        self._install_offset(offset)

    def train_only(self, keys: Sequence[Key], blocks: Sequence[int] = ()) -> list[nn.Parameter]:
        """Freeze everything but ``keys``, and of a part in blocks all but ``blocks`` if some are named."""
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        chosen = []
        for key in keys:
            parameters = self.parameters(key)
            chosen += [parameters[block] for block in blocks] if blocks and len(parameters) > 1 else parameters
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen

    def tensors(self) -> Tensors:
        """A copy of every tensor of the adapter and the head: float32, on the CPU."""
        return {
            key: torch.cat([parameter.detach().float().cpu() for parameter in self.parameters(key)])
            for key in self.keys
        }

    def logits(self, batch: Batch) -> Tensor:
        """The model's output for ``N x T`` token ids: ``N x T x V``, ``N x classes``, or vectors, ``N x d``."""
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items() if name != "labels"}
        output: Tensor = self.network(**inputs).logits
        return output

    def outputs(self, batch: Batch) -> Output:
        """What a task's losses and scores are taken from, with the labels on this model's device."""
        with self._packing.on(batch["attention_mask"]) as layout:
            output = self._outputs(batch)
        return output._replace(reference=partial(self._reference, batch), rows=layout.unpack if layout else None)

    def padded(self) -> AbstractContextManager[None]:
        """While it lasts, every layer sees N x T x d: what some ways to a gradient want."""
        return self._packing.off()

    def attend_by(self, implementation: str) -> None:
        """Take another attention, by Transformers' name; packed where that keeps texts apart, as it is tried anew.

        Raises :class:`ValueError` or :class:`ImportError` where the model has no such one.
        """
        network: Any = next(module for module in self.network.modules() if isinstance(module, PreTrainedModel))
        network.set_attn_implementation(implementation)
        if network.config._attn_implementation != implementation:  # of which Transformers only warns
            raise ValueError(f"{type(network).__name__}, which has its own")
        self._packing = Packing(self.network.base_model.model)

    def compile_blocks(self) -> None:
        """Compile the blocks, for batches of any shape; what packs and unpacks around them is not."""
        packing.stay_uncompiled()
        for block in packing.blocks(parts.language_model(self.network.base_model.model)):
            block.forward = torch.compile(block.forward, dynamic=True)

    def _outputs(self, batch: Batch) -> Output:
        if self._token_losses is not None:
            return self._token_losses(batch)
        return Output(self.logits(batch), batch["labels"].to(self.device))

    @torch.no_grad()
    def _reference(self, batch: Batch) -> Tensor:
        """What the base alone makes of a batch, without any dropout."""
        training = self.network.training
        self.network.eval()
        for module in self._layers.values():
            # PEFT's own way freezes and unfreezes parameters as it goes.
            module._disable_adapters = True
        try:
            with self._packing.on(batch["attention_mask"]):
                return self._outputs(batch).values
        finally:
            for module in self._layers.values():
                module._disable_adapters = False
            self.network.train(training)

    @torch.no_grad()
    def score(self, task: Task, examples: Sequence[Example], batch_size: int) -> Score:
        """The task's held-out sums over ``examples``, batched by length."""
        self.network.eval()
        by_length = sorted(examples, key=lambda example: example.length)
        batches = (by_length[first : first + batch_size] for first in range(0, len(by_length), batch_size))
        return task.scored(self.outputs(task.collate(batch, self.pad)) for batch in batches)

    @torch.no_grad()
    def generate(self, prompt: str, tokenizer: PreTrainedTokenizerBase, new_tokens: int = 48) -> str:
        """Continue ``prompt`` greedily; the prompt is part of the answer."""
        self.network.eval()
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        encoded = torch.tensor([start + tokenizer(prompt, add_special_tokens=False)["input_ids"]], device=self.device)
        output = self.network.generate(
            input_ids=encoded,
            attention_mask=torch.ones_like(encoded),
            max_new_tokens=new_tokens,
            do_sample=False,
            repetition_penalty=1.1,
            pad_token_id=tokenizer.pad_token_id,
        )
        return str(tokenizer.decode(output[0], skip_special_tokens=True))

    def _rescale(self, scale: float) -> None:
        self._scale = scale
        for module in self._layers.values():
            module.scaling["default"] = scale

    def _inject(self) -> None:
        self._parameters: dict[Key, list[nn.Parameter]] = {
            Key(layer, part): parameters
            for layer, module in self._layers.items()
            for part, parameters in self.spec.structure.inject(module).items()
        } | self.spec.structure.join(self._layers)

    def _install_offset(self, offset: Tensors) -> None:
        current = self.network.peft_config.get("offset")
        rank = max((tensor.shape[1] for key, tensor in offset.items() if key.part == "Q"), default=0)
        if current is not None and current.r != rank:
            self.network.delete_adapter("offset")
        if rank == 0:
            self.network.base_model.set_adapter("default")
            return
        if current is None or current.r != rank:
            self.network.add_adapter("offset", self._peft_config(rank, dropout=0.0))
        self.network.base_model.set_adapter(["default", "offset"])
        for layer, module in self._layers.items():
            down, up = module.lora_A["offset"].weight, module.lora_B["offset"].weight
            if Key(layer, "Q") not in offset:
                up.zero_()
                continue
            q, p = offset[Key(layer, "Q")], offset[Key(layer, "P")]
            if q.shape[0] != up.shape[0] or p.shape[1] != down.shape[1] or q.shape[1] != p.shape[0]:
                raise BouquetError(
                    "the offset does not fit this machine's model",
                    where=layer,
                    expected=f"Q {up.shape[0]} x q, P q x {down.shape[1]}",
                    got=f"Q {tuple(q.shape)}, P {tuple(p.shape)}",
                )
            up.copy_(pad(q, (0, rank - q.shape[1])))
            down.copy_(pad(p, (0, 0, 0, rank - p.shape[0])))

    def _peft_config(self, rank: int, dropout: float) -> peft.LoraConfig:
        """Scale 1: the adapter's own is set on its layers, and the offset has none."""
        return peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            lora_dropout=dropout,
            target_modules=self._targets,
            fan_in_fan_out=self._transposed,
        )


def _head_parameters(network: nn.Module, heads: Sequence[str]) -> Iterator[tuple[Key, Any]]:
    for name in heads:
        for part, parameter in network.get_submodule(name).named_parameters(recurse=False):
            yield Key(name, PARTS[part]), parameter
