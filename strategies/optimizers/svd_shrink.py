"""AdamW along noised gradients whose singular values are shrunk by what the noise has added to them.

Gavish and Donoho, *Optimal Shrinkage of Singular Values*, arXiv:1405.7511. Of the gradients of private training it is
our own; arXiv:2510.01137 restores the decay of their singular values by another rule. Y (m x n, m <= n) is a gradient
with noise of standard deviation sigma in each value, u_i and y_i its left singular vectors and singular values:

    z_i = y_i / (sigma sqrt(n))        f_i = sqrt((z_i^2 - beta - 1)^2 - 4 beta) / z_i^2        beta = m / n
    Y' = sum_i max(f_i, floor) u_i u_i^T Y        f_i = 0 where z_i is at most 1 + sqrt(beta)

which is nearest to what was there before the noise, in the Frobenius norm, as m and n grow; a factor's m = r is small,
and then it is nearly z_i^2 - 1 over z_i^2. Sigma is known, since the mechanism has drawn it, and neither that nor
anything else of the data is estimated: it is post-processing, and free. A gradient that the noise drowns would leave a
factor where it is, so that ``floor`` stays of every direction; Adam lengthens what is short everywhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.method import option
from strategies.optimizers.adamw import AdamW


@dataclass(frozen=True, kw_only=True)
class SvdShrink(AdamW):
    """AdamW along noised gradients without the directions that are noise."""

    floor: float = option(0.1, gt=0, le=1)
    """The least share that stays of a direction."""

    name = "svd-shrink"
    paper = "arXiv:1405.7511"
    denoises = True

    def denoised(self, gradient: Tensor, deviation: float) -> Tensor:
        if gradient.dim() != 2 or not deviation:
            return gradient
        wide = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
        rows, columns = wide.shape
        values, left = torch.linalg.eigh(wide.double() @ wide.double().T)
        squares, beta = values.clamp_min(0) / (deviation**2 * columns), rows / columns
        above = squares > (1 + beta**0.5) ** 2
        kept = ((squares - beta - 1).square() - 4 * beta).clamp_min(0).sqrt() / squares.clamp_min(1)
        shares = torch.where(above, kept, 0.0).clamp_min(self.floor)
        shrunk: Tensor = (left * shares) @ left.T @ wide.double()
        return (shrunk if wide is gradient else shrunk.T).to(gradient.dtype)
