"""How the server steps from its state towards the mean of the nodes."""

from common.method import Registry
from strategies.server_optimizers.adam import FedAdam
from strategies.server_optimizers.momentum import FedAvgM
from strategies.server_optimizers.server_optimizer import ServerOptimizer, ToTheMean

SERVER_OPTIMIZERS = Registry[ServerOptimizer](
    "server-optimizer",
    ToTheMean,
    FedAvgM,
    FedAdam,
    default="none",
    chooses="How the server steps towards the mean of the nodes, for rules that average.",
)

__all__ = ["SERVER_OPTIMIZERS", "FedAdam", "FedAvgM", "ServerOptimizer", "ToTheMean"]
