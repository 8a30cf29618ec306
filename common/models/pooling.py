"""The vector of a text, from a model's last hidden states; a classifier over vectors.

    e = u / |u|        u = sum_t m_t h_t / sum_t m_t, or h_T of the last token        (m the attention mask)
    logits = W e + b

The mean is sentence-transformers' convention for encoders. A decoder's last token alone has seen the whole text.

What a stock head reads, one token through a pooler, is for the greater part the same for every text; under DP-SGD the
clipping norm and the noise are spent on it. The mean over the tokens, scaled to length 1, holds what differs.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class Pooled(nn.Module):
    """A model without its pooler; over its vectors, where there are ``classes``, a linear head in float32.

    ``last`` takes the last token for a text, in the place of the mean of all.
    """

    base_model_prefix = "encoder"
    """By this Transformers and PEFT find the encoder, as in their own models."""

    def __init__(self, encoder: PreTrainedModel, classes: int | None, *, last: bool) -> None:
        super().__init__()
        if hasattr(encoder, "pooler"):
            encoder.pooler = None  # type: ignore[assignment]  # and the encoder goes without
        self.encoder = encoder
        self.config = encoder.config
        self.last = last
        size = self.config.get_text_config().hidden_size
        # Vectors by themselves have no head.
        self.classifier = nn.Linear(size, classes, device=encoder.device, dtype=torch.float32) if classes else None
        # A new module trains, and an encoder as it is loaded does not.
        self.train(encoder.training)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **segments: Tensor) -> SequenceClassifierOutput:
        """Logits ``N x classes`` of ids ``N x T``, or vectors ``N x d``; ``segments`` as the encoder takes them."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **segments).last_hidden_state
        vectors = last(hidden, attention_mask) if self.last else pool(hidden, attention_mask)
        return SequenceClassifierOutput(logits=self.classifier(vectors) if self.classifier else vectors)


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of ``hidden`` (N x T x d) over the tokens that ``mask`` (N x T) keeps, of length 1, in float32."""
    # Scaling to length 1 makes the division of the mean superfluous.
    return normalize((hidden.float() * mask[:, :, None]).sum(1), dim=-1)


def last(hidden: Tensor, mask: Tensor) -> Tensor:
    """What ``hidden`` (N x T x d) is at each text's last token, before the padding; of length 1, in float32."""
    return normalize(hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1].float(), dim=-1)
