"""A classifier over the mean of an encoder's last hidden states.

What a stock head reads, one token through a pooler, is for the greater part the same for every text; under DP-SGD the
clipping norm and the noise are spent on it. The mean over the tokens, scaled to length 1, holds what differs.

    logits = W u / |u| + b        u = sum_t m_t h_t / sum_t m_t        (m the attention mask)
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooled(nn.Module):
    """An encoder without its pooler, and a linear head in float32."""

    def __init__(self, encoder: PreTrainedModel, classes: int) -> None:
        super().__init__()
        if hasattr(encoder, "pooler"):
            encoder.pooler = None  # type: ignore[assignment]  # and the encoder goes without
        self.encoder = encoder
        self.config = encoder.config
        size = self.config.get_text_config().hidden_size
        self.classifier = nn.Linear(size, classes, device=encoder.device, dtype=torch.float32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **segments: Tensor) -> SequenceClassifierOutput:
        """Logits ``N x classes`` of token ids ``N x T``; ``segments`` as the encoder takes them."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **segments).last_hidden_state
        return SequenceClassifierOutput(logits=self.classifier(pool(hidden, attention_mask)))


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of ``hidden`` (N x T x d) over the tokens that ``mask`` (N x T) keeps, of length 1, in float32."""
    # Scaling to length 1 makes the division of the mean superfluous.
    return normalize((hidden.float() * mask[:, :, None]).sum(1), dim=-1)
