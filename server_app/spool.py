"""The updates of a round on disk, until they are merged.

They come in any order and are merged in the order of the nodes' names, so that a run is repeatable; on disk, because a
thousand of them do not fit in memory. Nor should they fill it as the system's cache of the disk, which costs more of a
CPU than the disk itself: where the file system lets them, they pass the cache by.
"""

import mmap
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from common import durable
from common.adapter.values import Key, Update
from common.error import DiskError

FILE = "updates"
# What passes the cache by is written and read in whole pages, from memory that begins with one.
PAGE = mmap.PAGESIZE
FLOAT_BYTES = 4
PAGE_VALUES = PAGE // FLOAT_BYTES

Layout = tuple[tuple[Key, torch.Size], ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One update: the layout of its tensors, the page at which they begin, and its facts."""

    layout: Layout
    page: int
    weight: float
    scale: float
    slots: tuple[int, ...]

    @property
    def sizes(self) -> list[int]:
        """How many values each tensor has."""
        return [shape.numel() for _, shape in self.layout]


class Spool:
    """A folder that is there while a ``with`` block runs; its updates can be read again and again, one at a time.

    Tensors are float32.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = -1
        self._pages = 0
        self._entries: dict[str, Entry] = {}
        # A thousand updates have one layout, which is kept once.
        self._layouts: dict[Layout, Layout] = {}
        self._buffer = torch.empty(0)

    def put(self, node: str, update: Update) -> None:
        """Keep one node's update. Raises :class:`DiskError` where the disk does not take it."""
        layout = tuple((key, tensor.shape) for key, tensor in update.tensors.items())
        layout = self._layouts.setdefault(layout, layout)
        entry = Entry(layout, self._pages, update.weight, update.scale, update.slots)
        count = sum(entry.sizes)
        if len(self._buffer) < _whole(count):
            self._buffer = _aligned(_whole(count))
        if not count:  # a rule under which nothing leaves a node
            self._entries[node] = entry
            return
        torch.cat([tensor.reshape(-1) for tensor in update.tensors.values()], out=self._buffer[:count])
        with durable.writing("the updates of a round", self._folder / FILE):
            _write(self._file, _bytes(self._buffer[: _whole(count)]), self._pages * PAGE)
        self._pages += _whole(count) // PAGE_VALUES
        self._entries[node] = entry

    def drop(self, node: str) -> None:
        """Leave one node's update out."""
        del self._entries[node]

    @property
    def names(self) -> list[str]:
        """The nodes whose updates are here, in order."""
        return sorted(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Update]:
        """The updates in the order of the nodes' names."""
        for name in self.names:
            yield self._read(self._entries[name])

    def _read(self, entry: Entry) -> Update:
        # Memory of its own, since a rule may keep an update.
        count = sum(entry.sizes)
        values = _aligned(_whole(count))
        try:
            _read(self._file, _bytes(values), entry.page * PAGE)
        except OSError as error:
            where = str(self._folder / FILE)
            raise DiskError("the updates of a round cannot be read back", where=where, got=str(error)) from error
        chunks = torch.split(values[:count], entry.sizes)
        tensors = {key: chunk.view(shape) for (key, shape), chunk in zip(entry.layout, chunks, strict=True)}
        return Update(tensors, entry.weight, entry.scale, entry.slots)

    def __enter__(self) -> Self:
        shutil.rmtree(self._folder, ignore_errors=True)
        with durable.writing("the updates of a round", self._folder):
            self._folder.mkdir(parents=True)
            self._file = _open(self._folder / FILE)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        shutil.rmtree(self._folder, ignore_errors=True)


def _open(file: Path) -> int:
    """A new file, past the system's cache where the file system can do that."""
    flags = os.O_RDWR | os.O_CREAT
    try:
        opened = os.open(file, flags | getattr(os, "O_DIRECT", 0), 0o600)
    except OSError:
        return os.open(file, flags, 0o600)
    try:
        os.pwrite(opened, mmap.mmap(-1, PAGE), 0)
    except OSError:  # some file systems refuse at the first write
        os.close(opened)
        return os.open(file, flags, 0o600)
    return opened


def _whole(count: int) -> int:
    """So many values as fill whole pages, for ``count`` of them."""
    return -(-count // PAGE_VALUES) * PAGE_VALUES


def _aligned(count: int) -> Tensor:
    """Memory for so many values that begins with a page. It comes from the heap, where what is freed is used again."""
    spare = torch.empty(count + PAGE_VALUES)
    start = -spare.data_ptr() % PAGE // FLOAT_BYTES
    return spare[start : start + count]


def _bytes(values: Tensor) -> memoryview:
    return values.numpy().view(np.uint8).data


def _write(file: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written


def _read(file: int, memory: memoryview, at: int) -> None:
    while memory:
        if not (read := os.preadv(file, [memory], at)):
            raise DiskError("the updates of a round are cut short", expected=f"{len(memory):,} bytes more", got="0")
        memory, at = memory[read:], at + read
