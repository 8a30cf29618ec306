"""The frozen base, and the base with its adapter.

bitsandbytes is imported here, before PEFT and Transformers do, and without torch's compiler, whose import is a seventh
of a node's start: four of its functions are compiled where that can be done, and otherwise taken as they are.
"""

from typing import Any, NoReturn

import torch


def _not_now(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("nothing is compiled while bitsandbytes is imported")


_compile = torch.compile
try:
    torch.compile = _not_now
    import bitsandbytes  # noqa: F401
finally:
    torch.compile = _compile
