"""Whether this process answers for nodes of a simulation.

There, coordinator, nodes and data are one user's. It is a fact of the process, which whoever starts it declares before
a message comes; nothing in a message is asked.
"""

import sys

_declared = False


def declare() -> None:
    """Say for the life of this process that its nodes are simulated."""
    global _declared
    _declared = True


def simulated() -> bool:
    """Whether this process was declared so, or is an actor of Flower's own simulation."""
    ray = sys.modules.get("ray")
    return _declared or (ray is not None and bool(ray.is_initialized()))
