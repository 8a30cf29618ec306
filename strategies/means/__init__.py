"""How a mean over the nodes is taken: the weighted one, and those that a few hostile nodes cannot move far."""

from common.method import Registry
from strategies.means.krum import MultiKrum
from strategies.means.mean import Mean
from strategies.means.rank_vote import RankVote
from strategies.means.trimmed import Median, Trimmed
from strategies.means.weighted import Weighted

MEANS = Registry[Mean](
    "mean",
    Weighted,
    Trimmed,
    Median,
    MultiKrum,
    RankVote,
    default="weighted",
    chooses="How the mean over the nodes is taken, for rules that average.",
)

__all__ = ["MEANS", "Mean", "Median", "MultiKrum", "RankVote", "Trimmed", "Weighted"]
