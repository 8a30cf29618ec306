"""Which nodes have failed how many rounds in a row, and sit out; by name."""

from collections import Counter
from collections.abc import Iterable, Iterator

from flwr.app import MessageType

from common.config.coordinator import RoundConfig
from common.record.events import SitOut


class Streaks:
    """A round begins with training; a failure to train and one to score what came of it are one."""

    def __init__(self, config: RoundConfig) -> None:
        self._limit, self._pause = config.max_failures, config.sit_out
        self._streaks: Counter[str] = Counter()
        # Who has failed in the newest round; when each may take part again; who has failed in this exchange.
        self._failing: set[str] = set()
        self._back: dict[str, int] = {}
        self._lost: set[str] = set()

    def sits_out(self, name: str, draw: int) -> bool:
        """Whether a node is left out of the sample ``draw``."""
        return self._back.get(name, 0) > draw

    def begin(self) -> None:
        """An exchange begins."""
        self._lost.clear()

    def fail(self, name: str) -> None:
        """A node has failed in this exchange."""
        self._lost.add(name)

    def count(self, asked: Iterable[str], phase: str, number: int) -> Iterator[SitOut]:
        """After an exchange of round ``number``: those who sit out from now on."""
        for name in asked:
            if phase == MessageType.TRAIN:
                if name not in self._failing:
                    del self._streaks[name]
                self._failing.discard(name)
            if name not in self._lost or name in self._failing:
                continue
            self._failing.add(name)
            self._streaks[name] += 1
            if self._limit and self._pause and self._streaks[name] >= self._limit:
                self._back[name] = number + self._pause
                yield SitOut(round=number, node=name, failures=self._streaks[name], rounds=self._pause)
