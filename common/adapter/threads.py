"""Work on a model's layers whose results do not depend on the number of threads.

BLAS and LAPACK share a product or a decomposition out to their threads, and its last bits follow from how many those
are. So each layer's is computed by one thread, and the layers side by side.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Layer = TypeVar("Layer")
Result = TypeVar("Result")


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each(layers: Sequence[Layer], work: Callable[[Layer], Result]) -> list[Result]:
    """``work`` of every layer, in their order: one thread a layer, as many layers at a time as there are cores."""
    cores = min(len(layers), len(os.sched_getaffinity(0)))
    with one_thread():
        if cores <= 1:
            return [work(layer) for layer in layers]
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, layers))
