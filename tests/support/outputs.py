"""What a task is given for logits: the plain way, which forms all of them."""

from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from common.tasks import Output
from common.tasks.task import IGNORED


def of_tokens(logits: Tensor, labels: Tensor) -> Output:
    """Of a language model: logits ``N x T x V``, labels ``N x T``."""
    ahead, known = logits[:, :-1].float(), labels[:, 1:]
    losses = cross_entropy(ahead.mT, known, ignore_index=IGNORED, reduction="none")
    right = (ahead.argmax(-1) == known) & (known != IGNORED)
    return Output(pad(losses, (1, 0)), labels, pad(right, (1, 0)))
