"""A training step of TRL's SFTTrainer, for the benchmarks that stand ours beside it.

Over the same PEFT model as the bare step, texts that are tokenised already, TRL's own collator and loss (which also
takes the entropy of what is predicted, for its log), and its AdamW. *Padding-free* is ``SFTConfig(padding_free=True)``,
which the trainer documents for flash attention; with another one it is measured only where its loss is that of padded
texts.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import peft
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from common.tasks import Batch

TOLERANCE = 1e-4
"""How far a loss may be from the padded one's, of itself."""


class SftStep:
    """One optimizer step over padded ``batches`` with their labels, as our own steps have them."""

    def __init__(
        self,
        network: peft.PeftModel,
        words: PreTrainedTokenizerBase,
        batches: Sequence[Batch],
        *,
        padding_free: bool = False,
    ) -> None:
        device = next(network.parameters()).device
        parts = [list(_rows(batch)) for batch in batches]
        with tempfile.TemporaryDirectory() as folder:
            options = SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=len(parts[0]),
                gradient_accumulation_steps=len(parts),
                learning_rate=1e-4,
                padding_free=padding_free,
                max_length=None,
                gradient_checkpointing=False,
                bf16=device.type != "cpu",
                use_cpu=device.type == "cpu",
                dataloader_pin_memory=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            rows = Dataset.from_list([row for part in parts for row in part])
            self._trainer: Any = SFTTrainer(network, options, train_dataset=rows, processing_class=words)
        self._trainer.current_gradient_accumulation_steps = len(parts)
        self._optimizer = self._trainer.create_optimizer()
        self._batches = [
            {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
            for batch in map(self._trainer.data_collator, parts)
        ]
        self._count = sum((batch["labels"][:, 1:] != -100).sum() for batch in self._batches)

    def __call__(self) -> None:
        """Every batch forward and backward, and the optimizer."""
        for batch in self._batches:
            self._trainer.training_step(self._trainer.model, dict(batch), num_items_in_batch=self._count)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def loss(self) -> float:
        """The mean loss a token of all batches."""
        model = self._trainer.model
        return sum(
            float(self._trainer.compute_loss(model, dict(batch), num_items_in_batch=self._count))
            for batch in self._batches
        )

    def takes_the_loss_of(self, other: "SftStep") -> bool:
        """Whether both take the same loss."""
        return math.isclose(self.loss(), other.loss(), rel_tol=TOLERANCE)


def _rows(batch: Batch) -> Iterator[dict[str, list[int]]]:
    """The texts of a padded batch, as a data set has them."""
    for tokens, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True):
        yield {"input_ids": tokens[mask].tolist(), "labels": labels[mask].tolist()}
