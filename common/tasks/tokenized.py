"""What a tokenizer makes of texts, whatever errors they cause in it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from common.error import BouquetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_ids(tokenizer: "PreTrainedTokenizerBase", text: Any, **options: Any) -> list[int]:
    """The tokens of a text. Raises :class:`BouquetError` as :func:`tokenized` does."""
    return list(tokenized(tokenizer, text, **options)["input_ids"])


def tokenized(tokenizer: "PreTrainedTokenizerBase", text: Any, pair: Any = None, **options: Any) -> Mapping[str, Any]:
    """What a tokenizer makes of a text, or of a pair. Raises :class:`BouquetError` where it breaks down over them."""
    with tokenizing():
        encoded: Mapping[str, Any] = tokenizer(text, pair, **options)
        return encoded


@contextmanager
def tokenizing() -> Iterator[None]:
    """Raise :class:`BouquetError` where a tokenizer breaks down.

    Tokenizers are written in Rust, whose panics are no ``Exception``: unturned, one text would end the process.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise BouquetError("the tokenizer fails on a text", got=str(error)) from error
