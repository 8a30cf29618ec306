"""Some of the model's blocks in a round, drawn anew for each, as boosters are.

Zhang et al., *Less is More: Extreme Gradient Boost Rank-1 Adaption for Efficient Finetuning of LLMs* (XGBLoRA),
arXiv:2410.19917. A booster is a LoRA of rank 1 on L_s random blocks, trained, added to the model, and followed by the
next. Here L_s is ``train.blocks``, under any rule: what rests in a round is neither trained nor sent, and stays. FLoRA
of rank 1 makes a booster of a round: it adds the nodes' factors to the offset, and has them start again.
"""

import random
import re
from collections.abc import Iterable

from common.adapter.draws import layer_seed

BLOCK = re.compile(r".*?\.\d+(?=\.)")


def resting(layers: Iterable[str], count: int, seed: int, round: int) -> frozenset[str]:
    """Of all adapted layers those that lie in none of the ``count`` blocks that are drawn for a round; 0 draws all."""
    if not count:
        return frozenset()
    lies_in = {layer: block_of(layer) for layer in layers}
    blocks = sorted(set(lies_in.values()))
    drawn = random.Random(layer_seed(seed, round, "blocks")).sample(blocks, min(count, len(blocks)))
    return frozenset(layer for layer, block in lies_in.items() if block not in drawn)


def block_of(layer: str) -> str:
    """The block of a layer, by its name up to the first number; one that lies in none is its own."""
    found = BLOCK.match(layer)
    return found.group() if found else layer
