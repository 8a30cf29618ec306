"""The base model with its adapter: loading, quantising, injecting, reading and writing factors. All of PEFT is here.

The base is never written to. The adapter is PEFT's ``default``; the frozen offset is a second PEFT adapter on top.
"""

import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import peft
import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from common import embedded
from common.adapter import HEAD, Key, LayerShape, Spec, Tensors, check_shapes
from common.config import LoraConfig, ModelConfig, TaskConfig
from common.error import BouquetError
from common.tasks import TASKS, Example, Score, Task

HEADS = ("classifier", "score", "classification_head")
PREFIX = "base_model.model."


def location(name: str) -> str:
    """Where Transformers finds the model: the embedded one's folder, a local folder, or the hub id itself."""
    if name == "embedded":
        return str(embedded.unpack())
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")):
        raise BouquetError(
            "there is no such model folder",
            where="model.name",
            got=name,
            cure="Use 'embedded', an absolute path to a Transformers folder, or a hub id.",
        )
    return name


def describe(model: ModelConfig, lora: LoraConfig, task: TaskConfig) -> Spec:
    """The adapter's shapes, worked out on the meta device: no weight is loaded."""
    config = _from_hub(AutoConfig, model)
    with torch.device("meta"):
        if TASKS[task.name].sequence_classification:
            config.num_labels = task.labels
            skeleton = AutoModelForSequenceClassification.from_config(config)
        else:
            skeleton = AutoModelForCausalLM.from_config(config)
    return LoraModel(skeleton, lora).spec


@lru_cache(maxsize=1)
def load(model: ModelConfig, lora: LoraConfig, task: TaskConfig, device: str) -> "LoraModel":
    """The base model in its quantised form, with a LoRA injected; kept for the life of the process."""
    target = _device(device)
    compute = _compute_dtype(model.dtype, target)
    classification = TASKS[task.name].sequence_classification
    options: dict[str, Any] = {"dtype": compute, "device_map": {"": target}}
    if model.quantization != "none":
        options["quantization_config"] = _quantization(model.quantization, compute, classification)
    if classification:
        base = _from_hub(AutoModelForSequenceClassification, model, num_labels=task.labels, **options)
    else:
        base = _from_hub(AutoModelForCausalLM, model, **options)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with bfloat16 units, the first evaluation would repack the weights for inference, for good and
            # with loss, and no gradient would pass the layer again.
            module.support_avx512bf16_for_cpu = False
    if model.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return LoraModel(base, lora)


@lru_cache(maxsize=1)
def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without a padding token pads with its end token."""
    tokenizer: PreTrainedTokenizerBase = _from_hub(AutoTokenizer, model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class LoraModel:
    """A frozen base with one trained adapter, one frozen offset, and a head where the task has one."""

    def __init__(self, base: PreTrainedModel, lora: LoraConfig) -> None:
        head = [name for name, _ in base.named_children() if name in HEADS]
        targets = _targets(base, lora.targets, head)
        self._lora = lora
        self._targets = targets
        self.network = peft.PeftModel(base, self._peft_config(lora.rank, lora.alpha, lora.dropout))
        self._layers: dict[str, LoraLayer] = {
            name.removeprefix(PREFIX): module
            for name, module in self.network.named_modules()
            if isinstance(module, LoraLayer)
        }
        self._head: dict[Key, nn.Parameter] = dict(_head_parameters(base, head))
        self.spec = Spec(
            layers={
                layer: LayerShape(module.lora_B["default"].out_features, module.lora_A["default"].in_features)
                for layer, module in self._layers.items()
            },
            head={key: tuple(parameter.shape) for key, parameter in self._head.items()},
            rank=lora.rank,
            scale=lora.scale,
        )

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.network.parameters()).device

    def parameter(self, key: Key) -> nn.Parameter:
        """The parameter that holds one tensor of the adapter or the head."""
        if key.part in HEAD:
            return self._head[key]
        module = self._layers[key.layer]
        return (module.lora_A if key.part == "A" else module.lora_B)["default"].weight

    def keys(self) -> list[Key]:
        """Every tensor of the adapter and the head, in the model's order."""
        return [*self.spec.factor_shapes(), *self.spec.head]

    @torch.no_grad()
    def install(self, tensors: Tensors, scale: float, offset: Tensors) -> None:
        """Start from ``tensors`` (all of :meth:`keys`) at ``scale``, over ``offset``. Idempotent.

        Raises :class:`BouquetError` where names or shapes are not those of this model.
        """
        expected = self.spec.factor_shapes() | dict(self.spec.head)
        check_shapes(tensors, expected, "the state does not fit this machine's model")
        for key in expected:
            self.parameter(key).copy_(tensors[key])
        for module in self._layers.values():
            module.scaling["default"] = scale
        self._install_offset(offset)

    def train_only(self, keys: Sequence[Key]) -> list[nn.Parameter]:
        """Freeze everything but ``keys``; return their parameters."""
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        return [self.parameter(key).requires_grad_(True) for key in keys]

    def tensors(self) -> Tensors:
        """A copy of every tensor of the adapter and the head: float32, on the CPU."""
        return {key: self.parameter(key).detach().float().cpu().clone() for key in self.keys()}

    def logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The model's output for a batch of ``N x T`` token ids: ``N x T x V``, or ``N x classes``."""
        device = self.device
        output: Tensor = self.network(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits
        return output

    @torch.no_grad()
    def score(self, task: Task, examples: Sequence[Example], pad_token: int, batch_size: int) -> Score:
        """The task's held-out sums over ``examples``, batched by length."""
        self.network.eval()
        total = Score()
        by_length = sorted(examples, key=lambda example: len(example.tokens))
        for first in range(0, len(by_length), batch_size):
            batch = task.collate(by_length[first : first + batch_size], pad_token)
            part = task.score(self.logits(batch["input_ids"], batch["attention_mask"]).cpu(), batch["labels"])
            total = Score(total.loss + part.loss, total.correct + part.correct, total.count + part.count)
        return total

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

    def _install_offset(self, offset: Tensors) -> None:
        current = self.network.peft_config.get("offset")
        rank = max((tensor.shape[1] for key, tensor in offset.items() if key.part == "Q"), default=0)
        if current is not None and current.r != rank:
            self.network.delete_adapter("offset")
        if rank == 0:
            self.network.base_model.set_adapter("default")
            return
        if current is None or current.r != rank:
            self.network.add_adapter("offset", self._peft_config(rank, rank, dropout=0.0))
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

    def _peft_config(self, rank: int, alpha: float, dropout: float) -> peft.LoraConfig:
        return peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=self._targets)


def _targets(base: nn.Module, wanted: str, head: list[str]) -> list[str]:
    """Full names of the linear layers to adapt. Raises :class:`BouquetError` where none matches."""
    get_output = getattr(base, "get_output_embeddings", lambda: None)
    output = get_output()
    linear = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output and name.split(".")[0] not in head
    ]
    if wanted == "all-linear":
        return linear
    suffixes = [suffix.strip() for suffix in wanted.split(",")]
    missing = [suffix for suffix in suffixes if not any(f".{name}".endswith(f".{suffix}") for name in linear)]
    if missing:
        raise BouquetError(
            "the model has no such layer",
            where="lora.targets",
            expected=f"'all-linear' or some of {', '.join(sorted({name.split('.')[-1] for name in linear}))}",
            got=", ".join(missing),
        )
    return [name for name in linear if any(f".{name}".endswith(f".{suffix}") for suffix in suffixes)]


def _head_parameters(base: nn.Module, head: list[str]) -> Iterator[tuple[Key, nn.Parameter]]:
    for top in head:
        for name, module in base.get_submodule(top).named_modules(prefix=top):
            if isinstance(module, nn.Linear):
                yield Key(name, "W"), module.weight
                if module.bias is not None:
                    yield Key(name, "b"), module.bias


def _quantization(kind: str, compute: torch.dtype, classification: bool) -> BitsAndBytesConfig:
    # Transformers would quantise a fresh head that has a bias; naming modules replaces its own list of exceptions.
    skipped = list(HEADS) if classification else None
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=skipped,
    )


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        return torch.device(wanted)
    except RuntimeError as error:
        raise BouquetError("an unknown device", where="device", expected="auto, cpu or cuda:0", got=wanted) from error


def _compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    # On a CPU, bfloat16 costs two to three times float32.
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _from_hub(auto: Any, model: ModelConfig, **options: Any) -> Any:
    where = location(model.name)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*were not initialized.*")
            return auto.from_pretrained(where, revision=model.revision, **options)
    except (OSError, ValueError) as error:
        raise BouquetError(
            "the model cannot be loaded",
            where="model.name",
            got=f"'{model.name}' ({str(error).splitlines()[0]})",
            cure="Use 'embedded', an absolute path to a Transformers folder, or a hub id; offline, it must be in the hub cache.",
        ) from error
