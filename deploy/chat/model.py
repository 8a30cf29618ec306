"""A model with an adapter, for a person to talk to."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from common import tasks
from common.config.run import RunConfig
from common.error import BouquetError
from common.models import base, lengths, vocabulary
from common.sources.images import ImageFile
from common.tasks.vision import Vision
from deploy import adapters


class Model:
    """The base with the adapter in ``folder``, the tokenizer, and the form in which the task puts its texts.

    Every text is about the ``images``. Raises :class:`BouquetError` for those of an adapter that sees none.
    """

    def __init__(self, folder: Path, config: RunConfig, device: str, images: Sequence[Path] = ()) -> None:
        self._task = lengths.widest(config)
        self._images = [ImageFile(image) for image in images]
        if images and not self._task.sees:
            raise BouquetError(
                "an adapter trained on text only does not take images",
                where="--image",
                expected="an adapter of task.name = 'vision'",
                got=f"task.name = '{config.task.name}'",
                cure="Leave it out.",
            )
        for image in self._images:
            _ = image.size  # which says what is wrong with it
        self._tokenizer = base.load_tokenizer(config.model)
        self._network: Any = adapters.load(folder, config, device)
        self._device = next(self._network.parameters()).device

    @property
    def has_head(self) -> bool:
        """Whether it answers with what a head says."""
        return self._task.sequence_classification

    @property
    def tells_apart(self) -> bool:
        """Whether that is a share for each class."""
        return bool(self._task.classes)

    def demand_base(self) -> None:
        """Raise :class:`BouquetError` where the base model by itself has nothing to say."""
        if self.has_head:
            raise BouquetError(
                "the base model has no head of its own",
                where="--base",
                cure="The head was added in training: leave it out.",
            )

    @torch.no_grad()
    def readings(self, text: str) -> Mapping[str, float]:
        """What the head says, by name."""
        return self._task.readings(self._network(**self._encode(text)).logits[0])

    @torch.no_grad()
    def stream(
        self, text: str, new_tokens: int, temperature: float, with_adapter: bool, show: Callable[[str], None]
    ) -> None:
        """Answer ``text``, handing every piece to ``show`` as it comes. Raises :class:`BouquetError` on a long text."""
        encoded = self._encode(text)
        length = encoded["input_ids"].shape[1]
        limit = vocabulary.positions(self._network) or sys.maxsize
        if (room := limit - length) < 1:
            raise BouquetError("the text is too long", expected=f"fewer than {limit} tokens", got=str(length))
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature}
        greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        with self._adapter(with_adapter):
            self._network.generate(
                **encoded,
                max_new_tokens=min(new_tokens, room),
                pad_token_id=self._tokenizer.pad_token_id,
                streamer=_Streamer(self._tokenizer, show),
                **(sampling if temperature else greedy),
            )

    def _encode(self, text: str) -> tasks.Batch:
        task, words = self._task, self._tokenizer
        asked = task.ask(text, words, self._images) if isinstance(task, Vision) else task.ask(text, words)
        batch = task.collate([asked], 0)
        return {name: tensor.to(self._device) for name, tensor in batch.items() if name != "labels"}

    @contextmanager
    def _adapter(self, wanted: bool) -> Iterator[None]:
        if wanted:
            yield
        else:
            with self._network.disable_adapter():
                yield


class _Streamer(TextStreamer):
    """Hands over text as soon as whole words are there."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._show(text)
