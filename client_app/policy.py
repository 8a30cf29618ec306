"""What this node allows: a TOML file of its operator's, checked against what a run asks for and what would leave.

    rules = ["ffa-lora", "fedsvd"]        # an empty list, or a missing key, allows everything
    models = ["/models/llama-3.2-1b"]
    parts = ["B"]                         # kinds of tensors that may leave
    codecs = ["fp32", "bf16"]
    max-bytes = 20_000_000                # of one message
    min-examples = 200                    # fewer, and this node takes no part

    [privacy]
    modes = ["example"]
    max-epsilon = 8.0                     # of one run, every round of it
    min-noise-multiplier = 0.5

What holds without a file: a reply has the records of its kind and no others, and in a private run no figure at all.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from flwr.app import RecordDict

from common import accounting, wire
from common.accounting import Release
from common.adapter import HEAD
from common.codec import CodecName
from common.config import CountOrOff, Mode, NonNegative, RunConfig
from common.error import RefusalError
from common.section import Section, unknown_choice, validate
from common.tasks import TASKS
from strategies import RULES, Rule

RECORDS = {"query": {"node"}, "train": {"update", "metrics"}, "evaluate": {"metrics", "tallies", "sample"}}
PUBLIC_FACTS = {"name", "rank", "code", "where"}


class PrivacyPolicy(Section):
    """How private a run must be."""

    modes: Sequence[Mode] = ()
    max_epsilon: NonNegative = 0.0
    min_noise_multiplier: NonNegative = 0.0


class Policy(Section):
    """One node's policy. Empty lists and zeros allow everything."""

    rules: Sequence[str] = ()
    models: Sequence[str] = ()
    parts: Sequence[str] = ()
    codecs: Sequence[CodecName] = ()
    max_bytes: CountOrOff = 0
    min_examples: CountOrOff = 0
    privacy: PrivacyPolicy = PrivacyPolicy()

    @classmethod
    def read(cls, file: str) -> Self:
        """The policy in a TOML file; one that allows everything where ``file`` is empty.

        Raises :class:`RefusalError` where it cannot be read, :class:`ConfigError` with every mistake in it.
        """
        if not file:
            return cls()
        try:
            written = tomllib.loads(Path(file).expanduser().read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise RefusalError("the node's policy cannot be read", where=file, got=str(error)) from error
        mistakes = [
            unknown_choice(key, name, known)
            for key, known in (("rules", list(RULES)), ("parts", ["A", "B", "R", "W", "b"]))
            for name in (written[key] if isinstance(written.get(key), list) else [])
            if name not in known
        ]
        return validate(cls, written, mistakes, f"policy {file}", "Correct them in the file.")

    def check_run(self, config: RunConfig, rule: Rule, budget: float) -> None:
        """Raise :class:`RefusalError` with everything that the run asks for and this node does not allow.

        A node with a privacy ``budget`` (its ``privacy-epsilon``) takes part in private runs only, and in one whose
        noise is the coordinator's only where ``privacy.modes`` names it.
        """
        sent = {part for turn in range(config.num_server_rounds) for part in rule.plan(turn).sent}
        if rule.head == "shared" and TASKS[config.task.name].sequence_classification:
            sent |= HEAD
        mistakes = [
            *_outside("rule.name", [rule.name], self.rules),
            *_outside("model.name", [config.model.name], self.models),
            *_outside(f"what the rule '{rule.name}' sends", sorted(sent), self.parts),
            *_outside("wire.up", [config.wire.up], self.codecs),
            *_outside("privacy.mode", [config.privacy.mode], self.privacy.modes),
        ]
        mode, wanted = config.privacy.mode, self.privacy.max_epsilon or self.privacy.min_noise_multiplier
        if mode == "none" and (budget or wanted):
            what = "privacy-epsilon" if budget else "max-epsilon, min-noise-multiplier"
            mistakes.append(f"privacy.mode: expected a private run ({what}), got 'none'")
        if mode == "update-central" and budget and mode not in self.privacy.modes:
            mistakes.append("privacy.mode: expected noise of this node's own (privacy-epsilon), got 'update-central'")
        _refuse(mistakes)

    def check_data(self, examples: int) -> None:
        """Raise :class:`RefusalError` if there are too few examples; how many there are is not said."""
        if examples < self.min_examples:
            _refuse([f"examples: expected {self.min_examples} or more (min-examples), got fewer"])

    def check_release(self, release: Release, config: RunConfig, delta: float) -> None:
        """Raise :class:`RefusalError` if a run of such releases is not private enough, at the node's own ``delta``."""
        mistakes = []
        if release.noise_multiplier < (least := self.privacy.min_noise_multiplier):
            mistakes.append(f"the noise multiplier: expected {least:g} or more (min-noise-multiplier), got less")
        if limit := self.privacy.max_epsilon:
            whole = accounting.epsilon([release] * config.num_server_rounds, delta, config.privacy.accountant)
            if whole > limit:
                mistakes.append(f"the run's epsilon at delta {delta:g}: expected at most {limit:g}, got more")
        _refuse(mistakes)

    def check_reply(self, kind: str, content: RecordDict, config: RunConfig, public_weight: float) -> None:
        """Raise :class:`RefusalError` if a reply holds anything that may not leave this machine."""
        mistakes = _outside("records of a reply", sorted(content), sorted(RECORDS[kind]))
        if "update" in content.array_records:
            header = wire.read_header(content.array_records["update"])
            parts = sorted({part for _, part, _ in header.tensors})
            mistakes += _outside("parts in the update", parts, self.parts)
            mistakes += _outside("the update's codec", [header.codec], self.codecs)
            if config.privacy.mode != "none" and header.weight not in (1.0, public_weight):
                mistakes.append("the update's weight: expected a public one in a private run, got another")
        size = sum(wire.payload_bytes(record) for record in content.array_records.values())
        if self.max_bytes and size > self.max_bytes:
            mistakes.append(f"bytes: expected at most {self.max_bytes:,} (max-bytes), got {size:,}")
        if config.privacy.mode != "none":
            figures = [name for record in content.metric_records.values() for name in record]
            facts = [name for record in content.config_records.values() for name in record]
            mistakes += [f"figures in a private run: expected none, got {name!r}" for name in figures]
            mistakes += _outside("facts in a private run", facts, sorted(PUBLIC_FACTS))
        _refuse(mistakes)


def _refuse(mistakes: list[str]) -> None:
    if mistakes:
        raise RefusalError("\n  ".join(["this node's policy does not allow it:", *mistakes]))


def _outside(what: str, got: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """A mistake for everything in ``got`` that is not in ``allowed``; an empty ``allowed`` allows all."""
    return [f"{what}: expected {' or '.join(allowed)}, got {name!r}" for name in got if allowed and name not in allowed]
