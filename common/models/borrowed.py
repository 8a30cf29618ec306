"""Another program's PEFT model, whose adapter is exchanged in place."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import peft
from peft.tuners.lora import LoraLayer
from torch import nn

from common.adapter.lora import Lora
from common.adapter.spec import Spec
from common.config.run import ModelConfig
from common.error import RefusalError
from common.models import base
from common.models.adapted import LoraModel

CURE = "Give the trainer one plain LoRA, named 'default', with one rank, one alpha and the run's layers."
SHOWN = 3
"""Names of a list that an error gives."""


@lru_cache(maxsize=1)
def borrow(network: Any) -> "BorrowedModel":
    """The adapter of a PEFT model. Raises :class:`RefusalError` where it is not one plain LoRA.

    The last one is kept, since the offset of a run stays in it.
    """
    _check_adapter(network)
    return BorrowedModel(network)


class BorrowedModel(LoraModel):
    """A model that somebody else has loaded and adapted. Its factors are float32 from here on."""

    def __init__(self, network: Any) -> None:
        self.network = network
        base.keep_trainable(network)
        modules = [module for module in network.modules() if isinstance(module, LoraLayer)]
        self._targets = sorted(network.targeted_module_names)
        self._transposed = network.peft_config["default"].fan_in_fan_out
        for module in modules:
            # The run's sums are float32; a 16-bit adapter would lose small steps from round to round.
            module.lora_A["default"].float()
            module.lora_B["default"].float()
        rank, scale = modules[0].r["default"], modules[0].scaling["default"]
        self._find_adapter(network.get_base_model(), (), rank, scale, Lora())
        self._given = self.spec

    def check(self, wanted: Spec, model: ModelConfig) -> None:
        """Raise :class:`RefusalError` unless this is the base of a run, with the adapter that it ``wanted``."""
        _check_base(self.network.get_base_model(), model)
        given = self._given
        own, run = given.layers, wanted.layers
        if own != run:
            missing, further = run.keys() - own.keys(), own.keys() - run.keys()
            differing = [layer for layer in run.keys() & own.keys() if own[layer] != run[layer]]
            lists = {"no": missing, "also": further, "of a different shape": differing}
            got = "; ".join(f"{word} {_listed(names)}" for word, names in lists.items() if names)
            raise _unlike("layers other than the run's", "lora.targets", f"{len(run)} layers", got)
        if given.rank != wanted.rank:
            raise _unlike("a rank other than the run's", "lora.rank", str(wanted.rank), str(given.rank))
        if given.scale != wanted.scale:
            expected, got = f"{wanted.scale:g} (alpha / rank)", f"{given.scale:g}"
            raise _unlike("a scale other than the run's", "lora.alpha", expected, got)


def _check_adapter(network: Any) -> None:
    """Raise :class:`RefusalError` unless a network has one plain LoRA and nothing else that is trained."""
    if not isinstance(network, peft.PeftModel):
        raise _unlike("a model without an adapter", "peft_config", "a PEFT model", type(network).__name__)
    if list(network.peft_config) != ["default"]:
        raise _unlike("not exactly one adapter", "peft_config", "'default'", ", ".join(network.peft_config))
    modules = {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}
    plain = [name for name, module in modules.items() if _is_plain(module)]
    if not modules or len(plain) < len(modules):
        kind = str(network.peft_config["default"].peft_type.value)  # type: ignore[union-attr]
        got = f"{kind}, a different one at {_listed(modules.keys() - set(plain))}" if modules else kind
        raise _unlike("an adapter that is not plain LoRA", "peft_config", "LoRA's A and B on linear layers", got)
    factors = {f"{name}.lora_{part}.default.weight" for name in modules for part in "AB"}
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    if further := trained - factors:
        raise _unlike("more than an adapter is trained", "requires_grad", "only LoRA's A and B", _listed(further))
    if len(kinds := {(module.r["default"], module.scaling["default"]) for module in modules.values()}) > 1:
        got = ", ".join(f"rank {rank} at scale {scale:g}" for rank, scale in sorted(kinds))
        raise _unlike("layers of different ranks or scales", "rank_pattern, alpha_pattern", "one", got)


def _is_plain(module: Any) -> bool:
    """Whether a layer is W x + s B A x: no embedding, no convolution, no DoRA or other variant."""
    factors = [part["default"] for part in (module.lora_A, module.lora_B) if "default" in part]
    return len(factors) == 2 and all(type(factor) is nn.Linear for factor in factors) and not module.lora_variant


def _check_base(network: Any, model: ModelConfig) -> None:
    """Raise :class:`RefusalError` unless ``network`` is the run's base, held as the run has it."""
    held = _quantization(network)
    if held != model.quantization:
        raise _unlike("a base quantised differently from the run's", "model.quantization", model.quantization, held)
    name, revision = str(network.config.name_or_path), getattr(network.config, "_commit_hash", None)
    name = str(Path(name).resolve()) if name and Path(name).is_dir() else name
    if (name, revision) == (base.location(model.name), base.commit(model)):
        return
    own = model.model_copy(update={"name": name, "revision": revision or "main"})
    if not name or base.digest(own) != base.digest(model):
        raise _unlike("a base model other than the run's", "model.name", model.name, name or "a model without a name")


def _quantization(network: Any) -> str:
    """How the weights of a network are held, in the words of ``model.quantization``."""
    config = getattr(network.config, "quantization_config", None)
    if config is None:
        return "none"
    facts = config if isinstance(config, dict) else config.to_dict()
    if facts.get("load_in_4bit"):
        return str(facts["bnb_4bit_quant_type"])
    return "int8" if facts.get("load_in_8bit") else str(getattr(facts["quant_method"], "value", facts["quant_method"]))


def _unlike(what: str, where: str, expected: str, got: str) -> RefusalError:
    return RefusalError(f"the trainer's model does not fit: {what}", where=where, expected=expected, got=got, cure=CURE)


def _listed(names: Any) -> str:
    found = sorted(names)
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
