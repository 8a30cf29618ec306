"""How a base model sees images: its own processor, held to what batches of several examples ask of it."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config.run import ModelConfig
from common.error import BouquetError
from common.models import base
from common.sources import files
from common.sources.images import ImageFile, made_up
from common.tasks import Batch, Task

KEPT = 10_000
"""Of how many sizes a process keeps how many tokens such an image takes."""
OF_TEXT = frozenset({"input_ids", "attention_mask"})
KINDS = "mm_token_type_ids"
"""What some models want beside their tokens: 1 for one of an image, 0 for a word."""


def seeing(task: Task, model: ModelConfig, source: str = "") -> Task:
    """The task, as the model sees its images, if it has any; those of the ``source`` lie beside or in it.

    Raises :class:`BouquetError` for a model that sees none.
    """
    return task.seeing(of(model), _folder(source)) if task.sees else task


@lru_cache(maxsize=1)
def of(model: ModelConfig) -> "ProcessorSight":
    """How the model sees. Raises :class:`BouquetError` where it sees nothing, or in no way that batches can have."""
    return ProcessorSight(base.load_processor(model), model.name)


def _folder(source: str) -> Path | None:
    """The folder that a source's images are in; None for data that are not on this disk."""
    if not source or files.files(source) is None:
        return None
    path = Path(source).expanduser().resolve()
    return path if path.is_dir() else path.parent


class ProcessorSight:
    """A processor of Transformers', in the terms of a task."""

    def __init__(self, processor: Any, where: str) -> None:
        self.mark, self.token = str(processor.image_token), int(processor.image_token_id)
        self._processor = processor
        self._where = where
        self._tokens = lru_cache(maxsize=KEPT)(self._read_tokens)
        self._kinds = KINDS in self._read(made_up(0).open())
        self._check()

    def tokens(self, size: tuple[int, int]) -> Sequence[int]:
        """The tokens in the place of a mark. Raises :class:`BouquetError` for a size that the processor refuses."""
        return self._tokens(size)

    def inputs(self, images: Sequence[ImageFile], tokens: Tensor) -> Batch:
        """What the processor makes of ``images``, all in one, and the kinds of the ``tokens`` where they are wanted."""
        seen = self._pixels(images) if images else Batch()
        return seen | {KINDS: (tokens == self.token).long()} if self._kinds else seen

    def _read_tokens(self, size: tuple[int, int]) -> tuple[int, ...]:
        from PIL import Image  # the processor that is here has asked for it already

        # How many there are is decided by an image's size, whatever is to be seen on it.
        (own,) = self._read(Image.new("RGB", size))["input_ids"].tolist()
        return tuple(own)

    def _read(self, image: Any) -> Mapping[str, Any]:
        try:
            read: Mapping[str, Any] = self._processor(
                text=self.mark, images=[image], add_special_tokens=False, return_tensors="pt"
            )
        except Exception as error:  # a boundary: a processor is a program of somebody else's
            raise BouquetError(
                "the model's processor rejects an image", where=self._where, got=f"{image.size}: {error}"
            ) from error
        return read

    def _pixels(self, images: Sequence[ImageFile]) -> Batch:
        opened = [image.open() for image in images]
        made = self._processor.image_processor(images=opened, return_tensors="pt")
        return {name: value for name, value in made.items() if name not in self._processor.unused_input_names}

    def _check(self) -> None:
        """Raise :class:`BouquetError` unless several images are, to the model, what each of them is by itself."""
        images = [made_up(0), made_up(1)]
        alone = [
            {name: value for name, value in self._read(image.open()).items() if name not in OF_TEXT | {KINDS}}
            for image in images
        ]
        together = self._pixels(images)
        if not all(isinstance(value, Tensor) for value in together.values()) or not all(
            one.keys() == together.keys() for one in alone
        ):
            self._refuse(f"{', '.join(sorted(together))} of two, {', '.join(sorted(alone[0]))} of one")
        for name, value in together.items():
            if not torch.equal(value, torch.cat([one[name] for one in alone])):
                self._refuse(f"a different {name} for two images than for each")

    def _refuse(self, got: str) -> None:
        raise BouquetError(
            "images of several examples cannot be batched for this model",
            where=f"{self._where}, of the processor {type(self._processor).__name__}",
            expected="for several images the values of each, concatenated",
            got=got,
            cure="Choose another model, such as a LLaVA.",
        )
