"""A base model and its tokenizer, made to agree: padding, end tokens, and how long a text may be."""

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.error import BouquetError
from common.sources.fields import LeftOut
from common.tasks.task import IGNORED, Example
from common.tasks.turns import conversation

TURNS = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]


def check_template(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, where: str) -> None:
    """Raise :class:`BouquetError` where the chat template writes words that the model does not have."""
    check(_conversation(tokenizer).tokens, tokenizer, config, where)


def check(tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, where: str) -> None:
    """Raise :class:`BouquetError` where a token is none of the model's: tokenizers may have more, if no text does."""
    size = config.get_text_config().vocab_size
    if beyond := sorted({token for token in tokens if token >= size}):
        raise BouquetError(
            "the tokenizer has words that the model does not have",
            where=where,
            expected=f"token ids below {size:,}",
            got=f"{len(beyond):,} beyond, such as {tokenizer.convert_ids_to_tokens(beyond[-1])!r} ({beyond[-1]:,})",
            cure="Use the tokenizer that the model was saved with, or resize the model's embeddings and save it.",
        )


def pad_token(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int:
    """The id to pad with: the model's own, or else another that it knows; what is padded is masked.

    A classifier on a decoder reads the last token that is not the model's padding id, so that both must have one.
    """
    text = config.get_text_config()
    for token in (getattr(text, "pad_token_id", None), tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int) and 0 <= token < text.vocab_size and tokenizer.convert_ids_to_tokens(token):
            return token
    return 0


def ends(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, generation: Any = None) -> list[int]:
    """The ids at which an answer is over: the tokenizer's, the model's, and the end of a turn in the chat template."""
    found: set[int] = set()
    for said in (tokenizer.eos_token_id, end_of_turn(tokenizer), _eos(config.get_text_config()), _eos(generation)):
        found.update(said if isinstance(said, list) else [] if said is None else [said])
    return sorted(found)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that a turn of the assistant ends with, as it is learned; None where there is no such."""
    if tokenizer.chat_template is None:
        return None
    learned = [int(label) for label in _conversation(tokenizer).labels if label != IGNORED]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return learned[-1] if learned and learned[-1] in special else None


def _conversation(tokenizer: PreTrainedTokenizerBase) -> Example:
    """A short conversation as the model reads it; nothing where the template takes none."""
    try:
        (example,) = conversation(TURNS, tokenizer, sys.maxsize)
    except (BouquetError, LeftOut):
        return Example([], [])
    return example


def positions(network: nn.Module) -> int | None:
    """How many tokens a model takes, from its skeleton; None where it knows no bound.

    The RoBERTa family counts positions from behind its padding id.
    """
    config: Any = network.config
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    tables = [table for name, table in network.named_modules() if "position" in name]
    shifts = [table.padding_idx for table in tables if isinstance(table, nn.Embedding)]
    return most - max((shift + 1 for shift in shifts if shift is not None), default=0)


def _eos(config: Any) -> int | list[int] | None:
    found: int | list[int] | None = getattr(config, "eos_token_id", None)
    return found
