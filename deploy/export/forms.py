"""The forms of an export: one LoRA, whole or truncated to a rank, and a merged model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from common import tasks
from common.adapter import algebra, structures
from common.adapter.structure import LORA
from common.adapter.values import HEAD, Key, State
from common.config.run import RunConfig
from common.error import BouquetError
from common.models import base
from common.record.export import export
from common.record.form import one_lora
from deploy import adapters

DTYPES: Mapping[str, str] = {"bf16": "bfloat16", "fp16": "float16"}


def cut(state: State, rank: int) -> tuple[State, float]:
    """The LoRA of ``rank`` that is nearest in every layer, and the share of the squared singular values that it keeps.

    Nearest in the Frobenius norm (Eckart and Young); from two QRs and a small SVD a layer, never a dense product.
    Raises :class:`BouquetError` on a rank that is larger than there is.
    """
    whole = one_lora(state)
    if not 1 <= rank <= whole.rank:
        raise BouquetError(
            "a rank that the adapter cannot be truncated to",
            where="--rank",
            expected=f"1 to {whole.rank}, its full rank",
            got=str(rank),
        )
    factors = {key: tensor for key, tensor in whole.adapter.items() if key.part in HEAD}
    kept = total = 0.0
    for layer in whole.layers():
        left, right = _cut(whole.adapter[Key(layer, "B")], whole.adapter[Key(layer, "A")], rank)
        energy = float(algebra.squared_norm(whole.adapter[Key(layer, "B")], whole.adapter[Key(layer, "A")]))
        kept, total = kept + float(algebra.squared_norm(left, right)), total + energy
        factors[Key(layer, "B")], factors[Key(layer, "A")] = left, right
    return replace(whole, adapter=factors), kept / total if total else 1.0


def _cut(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    b, a = algebra.balanced(*algebra.low_rank_svd(left.double(), right.double()), rank)
    return b.to(left.dtype), a.to(right.dtype)


def rank(state: State) -> int:
    """The rank of the one LoRA that a state is; 0 where it is none."""
    return one_lora(state).rank if structures.of(state.adapter).form == LORA else 0


def write_peft(state: State, config: RunConfig, folder: Path) -> None:
    """One PEFT adapter, its values in float32."""
    export(state, config, folder, with_head=True)


def write_merged(state: State, config: RunConfig, folder: Path, dtype: str, device: str) -> None:
    """The base in ``bf16`` or ``fp16`` with the adapter added to its weights, the tokenizer, and what shows it images.

    The base is loaded in that type, not dequantised: what a merge into 4 bits would round away stays.
    Raises :class:`BouquetError` for a head that Transformers has no model for.
    """
    if config.model.pooled and tasks.classes(config.task):
        raise BouquetError(
            "Transformers has no model with this head",
            where="model.pooling = 'mean'",
            cure="Export --form peft: the README in it has the code that loads it.",
        )
    plain = unquantised(config, DTYPES[dtype])
    with TemporaryDirectory() as temporary:
        write_peft(state, config, Path(temporary))
        network: Any = adapters.load(Path(temporary), plain, device)
    adapted = network.encoder if base.bare(config.model, tasks.classes(config.task)) else network
    merged = adapted.merge_and_unload(safe_merge=True)
    if names := config.task.names:
        merged.config.id2label = dict(enumerate(names))
        merged.config.label2id = {name: number for number, name in enumerate(names)}
    merged.save_pretrained(folder)
    if tasks.TASKS[config.task.name].sees:
        base.load_processor(config.model).save_pretrained(folder)
    base.load_tokenizer(config.model).save_pretrained(folder)


def unquantised(config: RunConfig, dtype: str) -> RunConfig:
    """The same settings over the base model as it is, computed in ``dtype``."""
    return _with_model(config, quantization="none", dtype=dtype)


def in_float32(config: RunConfig) -> RunConfig:
    """The same settings, computed in float32; a quantised base stays quantised."""
    return _with_model(config, dtype="float32")


def at(config: RunConfig, folder: Path) -> RunConfig:
    """The settings with which a merged model is read back: float32 holds every value of bf16 and fp16."""
    return _with_model(config, name=str(folder.resolve()), revision="main", quantization="none", dtype="float32")


def _with_model(config: RunConfig, **changes: str) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})
