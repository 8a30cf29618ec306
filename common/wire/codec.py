"""The contract of a codec: how one flat float32 tensor becomes one numpy array, and comes back."""

from abc import abstractmethod
from typing import Any, ClassVar

from numpy.typing import NDArray
from torch import Tensor

from common.method import Method

Array = NDArray[Any]


class Codec(Method):
    """One wire format: ``dtype`` is numpy's type for it; the error of a ``coarse`` one is worth feeding back."""

    section = "wire"
    paper = "none"

    dtype: ClassVar[str]
    coarse: ClassVar[bool] = False

    @abstractmethod
    def size(self, count: int) -> int:
        """The length of the array that ``count`` values become."""

    def holds(self, values: Tensor) -> bool:
        """Whether all of ``values`` lie in its range."""
        return True

    @abstractmethod
    def encode(self, values: Tensor) -> Array:
        """Encode one flat, contiguous float32 tensor on the CPU."""

    @abstractmethod
    def decode(self, array: Array, count: int) -> Tensor:
        """Decode ``count`` values from an array of the right type and length."""
