"""How a model sees images, in the terms of a task."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from common.sources.images import ImageFile


class Sight(Protocol):
    """What stands among the tokens for an image, and what goes in beside them."""

    mark: str
    """What stands in a text for an image."""
    token: int
    """The token of the mark, in whose places the model puts what it sees."""

    def tokens(self, size: tuple[int, int]) -> Sequence[int]:
        """The tokens in the place of a mark, for an image of this width and height in pixels."""

    def inputs(self, images: Sequence[ImageFile], tokens: Tensor) -> dict[str, Tensor]:
        """What goes in beside ``tokens`` (N x T), whose images these are, in the order of the rows.

        Raises :class:`BouquetError` where an image cannot be read.
        """
