"""How one machine computes a model that is loaded: by which attention, and whether its blocks are compiled.

Both are the machine's own (``attention``, ``compile`` in the node's config): nodes of a run may differ, since what they
train, send and are told apart by, the digest of the base, does not depend on it, but for the last bits of a float.

* **flash** takes the package flash-attn, a CUDA device and a 16-bit ``model.dtype``. Batches are then padded, since it
  makes no mask that could tell packed texts apart (:mod:`common.models.packing`); within attention itself Transformers
  leaves the padding out.
* **compile** is ``torch.compile`` of each of the model's blocks, for shapes of any size. Attention, which packing steps
  into, and the packing around the blocks stay outside of what is compiled. The first step takes as long as compiling
  does, in every process: it is for long rounds and warm nodes.
"""

from functools import lru_cache

import torch
from transformers.utils.import_utils import is_flash_attn_2_available

from common.config.node import NodeConfig
from common.error import RefusalError
from common.models.adapted import LoraModel
from common.models.placement import find_devices

FLASH = "flash_attention_2"


def check(node: NodeConfig) -> None:
    """Raise :class:`RefusalError` where this machine cannot compute any model as the node's config says."""
    device = find_devices(node.devices[0])[0].type
    if node.attention == "flash" and (device != "cuda" or not is_flash_attn_2_available()):
        got = "none" if device == "cuda" else f"a {device.upper()}"
        raise _refusal("flash", "a CUDA device, and flash-attn built for it and for this torch", got)
    if node.compile:
        _check_compiler(device)


def check_gradient(node: NodeConfig, *, whole: bool) -> None:
    """Raise :class:`RefusalError` where blocks would be compiled in a run that looks into them for each example's."""
    if node.compile and not whole:
        raise RefusalError(
            "compiled blocks do not tell the gradients of single examples",
            where="compile, of the node's config",
            expected="false in a run with privacy.mode = 'example'",
            got="true",
            cure="Set compile = false on this node.",
        )


def choose(model: LoraModel, node: NodeConfig) -> None:
    """Have a model computed as the node's config says. Raises :class:`RefusalError` where it cannot be."""
    check(node)
    if node.attention == "flash" and model.dtype not in (torch.float16, torch.bfloat16):
        raise _refusal("flash", "a run in 16 bits, model.dtype = 'bfloat16' or 'float16'", str(model.dtype))
    if node.attention != "auto":
        try:
            model.attend_by(FLASH if node.attention == "flash" else node.attention)
        except (ValueError, ImportError) as error:  # as Transformers says that a model has no such attention
            raise _refusal(node.attention, "one that the model has", str(error).splitlines()[0]) from error
    if node.compile:
        model.compile_blocks()


def _refusal(attention: str, expected: str, got: str) -> RefusalError:
    return RefusalError(
        "an attention that this machine cannot compute",
        where=f"attention = '{attention}', of the node's config",
        expected=expected,
        got=got,
        cure="Install what is missing, or set attention = 'auto'.",
    )


@lru_cache
def _check_compiler(device: str) -> None:
    """Raise :class:`RefusalError` where nothing can be compiled for a kind of device."""
    try:
        torch.compile(lambda values: values.sin() + 1)(torch.ones(64, device=device))
    except Exception as error:  # a boundary: whatever torch raises, it cannot compile
        raise RefusalError(
            "this machine cannot compile a model",
            where="compile, of the node's config",
            expected="a C++ compiler (g++) on a CPU, Triton on a GPU",
            got=(str(error) or type(error).__name__).strip().splitlines()[0],
            cure="Install it, or set compile = false.",
        ) from error
