"""How a mean over the nodes is taken: the weighted one, and three that a few hostile nodes cannot move far."""

from common.method import Registry
from strategies.means.krum import MultiKrum
from strategies.means.mean import Mean
from strategies.means.trimmed import Median, Trimmed
from strategies.means.weighted import Weighted

MEANS = Registry[Mean](
    "mean",
    Weighted,
    Trimmed,
    Median,
    MultiKrum,
    default="weighted",
    chooses="How the mean over the nodes is taken, for rules that average.",
)

__all__ = ["MEANS", "Mean", "Median", "MultiKrum", "Trimmed", "Weighted"]
