"""Requests for different adapters, answered together: one forward pass of the base, each row with its own adapter.

Rows are grouped by adapter inside every layer (PEFT's ``adapter_names``), which is the idea of S-LoRA (Sheng et al.,
arXiv:2311.03285) without its memory pool and its kernels.
"""

import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import StoppingCriteria

from common.config.run import RunConfig
from common.error import BouquetError
from common.models import base, vocabulary
from deploy import adapters

BASE = "__base__"  # PEFT's name for no adapter


class BusyError(BouquetError):
    """More requests wait than may wait."""


@dataclass(frozen=True)
class Request:
    """Tokens to be continued by at most ``limit`` more, with an adapter or (empty) the base; 0 takes the likeliest."""

    adapter: str
    tokens: list[int]
    limit: int
    temperature: float = 0.0


@dataclass(frozen=True)
class Completion:
    """What was added, and whether the model ended it or the limit did."""

    tokens: list[int]
    finished: Literal["stop", "length"]


Waiting = tuple[Request, Future[Completion]]


class Batches:
    """A base model with several adapters, and the requests that wait for it. A context: in it, a thread answers."""

    def __init__(
        self, folders: Mapping[str, Path], config: RunConfig, device: str = "auto", *, most: int = 8, waiting: int = 64
    ) -> None:
        (first, folder), *others = folders.items()
        # PEFT's names become names of modules, which may not hold a dot.
        self._names = {"": BASE} | {name: f"adapter{number}" for number, name in enumerate(folders)}
        self.network: Any = adapters.load(folder, config, device, self._names[first])
        for name, other in others:
            self.network.load_adapter(str(other), adapter_name=self._names[name])
        self.network.eval()
        self.tokenizer = base.load_tokenizer(config.model)
        self.context = vocabulary.positions(self.network) or sys.maxsize
        ends = self.network.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        self._most, self._window = most, 0.01
        self._waiting: queue.Queue[Waiting | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.put(None)
        self._thread.join()

    def complete(self, request: Request) -> Completion:
        """Wait for the answer to one request. Raises :class:`BusyError` where too many wait already."""
        answer: Future[Completion] = Future()
        try:
            self._waiting.put_nowait((request, answer))
        except queue.Full:
            raise BusyError(
                "too many requests are waiting", got=str(self._waiting.maxsize), cure="Try again later."
            ) from None
        return answer.result()

    def _work(self) -> None:
        """Answer what waits, as much at once as has come within the window."""
        ended = False
        while not ended:
            taken = [self._waiting.get()]
            until = time.monotonic() + self._window
            while taken[-1] is not None and len(taken) < self._most:
                try:
                    taken.append(self._waiting.get(timeout=max(0.0, until - time.monotonic())))
                except queue.Empty:
                    break
            ended = taken[-1] is None
            for batch in self._batches([each for each in taken if each is not None]):
                self._answer(batch)

    def _batches(self, taken: Sequence[Waiting]) -> Iterator[Sequence[Waiting]]:
        """What can be answered together: requests of one temperature, if the model has room for the longest of all."""
        for temperature in dict.fromkeys(request.temperature for request, _ in taken):
            batch = [each for each in taken if each[0].temperature == temperature]
            columns = max(len(request.tokens) for request, _ in batch) + max(request.limit for request, _ in batch)
            yield from [batch] if columns <= self.context else [[each] for each in batch]

    def _answer(self, batch: Sequence[Waiting]) -> None:
        try:
            completions = self.generate([request for request, _ in batch])
        except Exception as error:  # whatever it is, those who wait must hear of it
            for _, answer in batch:
                answer.set_exception(error)
            return
        for (_, answer), completion in zip(batch, completions, strict=True):
            answer.set_result(completion)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Continue all ``requests``, of one temperature, in one batch."""
        longest = max(len(request.tokens) for request in requests)
        ids = torch.full((len(requests), longest), int(self.tokenizer.pad_token_id), device=self.network.device)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            # Padding stands on the left, so that every row goes on at the same column.
            start = longest - len(request.tokens)
            ids[row, start:] = torch.tensor(request.tokens)
            mask[row, start:] = 1
        temperature = requests[0].temperature
        greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        output: Tensor = self.network.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(request.limit for request in requests),
            pad_token_id=int(self.tokenizer.pad_token_id),
            stopping_criteria=[_Limits(longest, [request.limit for request in requests])],
            adapter_names=[self._names[request.adapter] for request in requests],
            **({"do_sample": True, "temperature": temperature} if temperature else greedy),
        )
        return [self._cut(row[longest:].tolist(), each.limit) for row, each in zip(output, requests, strict=True)]

    def _cut(self, tokens: list[int], limit: int) -> Completion:
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        if end is not None and end < limit:
            return Completion(tokens[:end], "stop")
        return Completion(tokens[:limit], "length")


class _Limits(StoppingCriteria):
    """Every row ends at its own limit."""

    def __init__(self, start: int, limits: list[int]) -> None:
        self._start, self._limits = start, limits

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        grown = input_ids.shape[1] - self._start
        return torch.tensor([grown >= limit for limit in self._limits], device=input_ids.device)
