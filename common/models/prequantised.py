"""Bases that come already quantised: which can be trained on as they are, and what that needs.

NF4 and int8 of bitsandbytes are held as they were saved, and so are GPTQ and AWQ. The kernels of fp8 and of
compressed-tensors have no backward pass: their weights are held in ``model.dtype``.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from transformers import PretrainedConfig

from common.error import BouquetError

LIBRARIES: Mapping[str, Sequence[str]] = {
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "fp8": (),
    "compressed-tensors": ("compressed-tensors",),
}
"""The methods that are read and not made here, and the packages that each takes."""
# gptqmodel asks for a newer torch than Bouquet's, and works with it.
GPTQMODEL = "--no-deps gptqmodel pypcre threadpoolctl device-smi tokenicer logbar defuser torchao"
INSTALLED_BY: Mapping[str, str] = {
    "gptq": f"{GPTQMODEL} optimum",
    "awq": GPTQMODEL,
    "compressed-tensors": "compressed-tensors",
}
"""What pip is given for each."""
MADE_HERE = ("nf4", "int8")
WIDENED = ("fp8", "compressed-tensors")


def check(config: PretrainedConfig, wanted: str, where: str) -> None:
    """Raise :class:`BouquetError` for a base that was saved in another quantisation than the one that is ``wanted``."""
    found = _method(config)
    if found == wanted or (found == "none" and wanted not in LIBRARIES):
        return
    if found == "none":
        raise BouquetError(
            "the base model is not quantised, and Bouquet does not quantise to this format",
            where=f"{where}, model.quantization",
            expected="'nf4', 'int8' or 'none'",
            got=f"'{wanted}'",
            cure="Choose one of these, or name a base that was saved that way.",
        )
    known = found in MADE_HERE or found in LIBRARIES
    raise BouquetError(
        "the base model has been quantised already",
        where=where,
        expected=f"model.quantization = '{wanted}', with {'such a' if wanted in LIBRARIES else 'an unquantised'} base",
        got=f"weights in {found}",
        cure=f"Set model.quantization = '{found}', or name the unquantised base: a merged export needs it."
        if known
        else "Name the unquantised base.",
    )


def prepare(config: PretrainedConfig, wanted: str, heads: Sequence[str], where: str) -> None:
    """Let the weights of such a base be loaded to be trained on; of any other base nothing changes.

    Its ``heads`` are of no quantisation. Raises :class:`BouquetError` where a package is not installed.
    """
    if _method(config) == "none":
        return
    missing = [name for name in LIBRARIES.get(wanted, ()) if find_spec(name.replace("-", "_")) is None]
    if missing:
        raise BouquetError(
            f"the packages that read a base in {wanted} are not installed",
            where=where,
            expected=" and ".join(LIBRARIES[wanted]),
            got=f"no {' and no '.join(missing)}",
            cure=f"pip install {INSTALLED_BY[wanted]}, or name the unquantised base.",
        )
    told = _told(config)
    if wanted in WIDENED:
        told["dequantize"] = True
    if wanted in MADE_HERE and heads:
        told["llm_int8_skip_modules"] = sorted({*(told.get("llm_int8_skip_modules") or ()), *heads})
    config.quantization_config = told


def _method(config: PretrainedConfig) -> str:
    """How the weights were quantised, as ``model.quantization`` names it; ``none`` where they were not."""
    if not (told := _told(config)):
        return "none"
    method = str(getattr(told.get("quant_method"), "value", told.get("quant_method")))
    if told.get("load_in_4bit"):
        return str(told.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if told.get("load_in_8bit") else method


def _told(config: PretrainedConfig) -> dict[str, Any]:
    saved = getattr(config, "quantization_config", None) or {}
    return dict(saved) if isinstance(saved, Mapping) else dict(saved.to_dict())
