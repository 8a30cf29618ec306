"""How one machine computes a loaded model: by which attention and kernels, and whether its blocks are compiled.

All are the machine's own (``attention``, ``compile``, ``kernels`` in the node's config): nodes of a run may differ,
since what they train, send and are told apart by, the digest of the base, does not depend on it, but for the last bits
of a float.

* **flash** takes the package flash-attn, a CUDA device and a 16-bit ``model.dtype``. Batches are then padded, since it
  makes no mask that could tell packed texts apart (:mod:`common.models.packing`); within attention itself Transformers
  leaves the padding out.
* **compile** is ``torch.compile`` of each of the model's blocks, for shapes of any size. Attention, which packing steps
  into, and the packing around the blocks stay outside of what is compiled. The first step takes as long as compiling
  does, in every process: it is for long rounds and warm nodes.
* **liger** has norms, rotary positions and gated layers computed by Liger's fused kernels (arXiv:2410.10989), put in by
  Transformers. Its losses are left out: only labelled positions have logits here, in chunks of their own
  (:mod:`common.models.token_losses`). Not run here, where there is no GPU.
"""

from functools import lru_cache

import torch
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils.import_utils import is_flash_attn_2_available, is_liger_kernel_available

from common.config.node import NodeConfig
from common.error import RefusalError
from common.models.adapted import LoraModel
from common.models.placement import find_devices

FLASH = "flash_attention_2"
NO_LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def check(node: NodeConfig) -> None:
    """Raise :class:`RefusalError` where this machine cannot compute any model as the node's config says."""
    device = find_devices(node.devices[0])[0].type
    got = "none" if device == "cuda" else f"a {device.upper()}"
    if node.attention == "flash" and (device != "cuda" or not is_flash_attn_2_available()):
        raise _refusal("attention", "flash", "a CUDA device, and flash-attn built for it and for this torch", got)
    if node.kernels == "liger" and (device != "cuda" or not is_liger_kernel_available()):
        raise _refusal("kernels", "liger", "a CUDA device, and liger-kernel with Triton", got)
    if node.compile:
        _check_compiler(device)


def check_gradient(node: NodeConfig, *, whole: bool) -> None:
    """Raise :class:`RefusalError` where blocks would be compiled in a run that looks into them for each example's."""
    if node.compile and not whole:
        raise RefusalError(
            "compiled blocks hide the gradients of single examples",
            where="compile, of the node's config",
            expected="false in a run with privacy.mode = 'example'",
            got="true",
            cure="Set compile = false on this node.",
        )


def choose(model: LoraModel, node: NodeConfig) -> None:
    """Have a model computed as the node's config says. Raises :class:`RefusalError` where it cannot be."""
    check(node)
    if node.attention == "flash" and model.dtype not in (torch.float16, torch.bfloat16):
        raise _refusal("attention", "flash", "a 16-bit run, model.dtype = 'bfloat16' or 'float16'", str(model.dtype))
    if node.attention != "auto":
        try:
            model.attend_by(FLASH if node.attention == "flash" else node.attention)
        except (ValueError, ImportError) as error:  # as Transformers says that a model has no such attention
            got = str(error).splitlines()[0]
            raise _refusal("attention", node.attention, "one that the model supports", got) from error
    if node.kernels == "liger":
        _fuse(model)
    if node.compile:
        model.compile_blocks()


def _fuse(model: LoraModel) -> None:
    """Put Liger's kernels into a model; one of a family that it does not know, it would pass over in silence."""
    apply_liger_kernel(model.network, NO_LOSSES)
    if not any(layer.forward.__module__.startswith("liger_kernel") for layer in model.network.modules()):
        family = model.network.config.model_type
        raise _refusal("kernels", "liger", "a family of models that liger-kernel has kernels for", family)


def _refusal(key: str, choice: str, expected: str, got: str) -> RefusalError:
    return RefusalError(
        "a setting that this machine cannot compute with",
        where=f"{key} = '{choice}', of the node's config",
        expected=expected,
        got=got,
        cure=f"Install what is missing, or set {key} = 'auto'.",
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
