"""The command that serves adapters with vLLM."""

from collections.abc import Mapping
from pathlib import Path

from common.error import BouquetError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for ``--max-lora-rank`` (``MaxLoRARanks`` in vllm/config/lora.py)."""


def command(base: str, adapters: Mapping[str, Path], rank: int) -> list[str]:
    """``vllm serve`` with the base model and ``adapters`` by name, the largest of which has ``rank``.

    Raises :class:`BouquetError` on a rank that vLLM does not serve.
    """
    allowed = next((limit for limit in RANKS if limit >= rank), None)
    if allowed is None:
        raise BouquetError(
            "vLLM cannot serve an adapter of this rank",
            where="--max-lora-rank",
            expected=f"at most {RANKS[-1]}",
            got=str(rank),
            cure=f"Truncate it: bouquet export ... --rank {RANKS[-1]}; or merge it: bouquet export ... --form merged.",
        )
    named = [f"{name}={folder}" for name, folder in adapters.items()]
    return ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(allowed), "--lora-modules", *named]
