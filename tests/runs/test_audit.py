"""The auditor: it lets an honest node pass, and finds the faults that private training has had when they are back."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from scipy.stats import beta, binom

from client_app import units
from client_app.session import Session
from common.config import node as node_config
from common.privacy import gaussian
from common.sources import stdlib
from deploy.audit import bounds, invariants, trials
from deploy.audit.canaries import Maker, usable
from deploy.audit.node import Bench
from deploy.command import main
from strategies import read_config
from strategies.gradients.engine import Engine

SMALL = {
    "privacy.mode": "example",
    "privacy.accountant": "rdp",
    "privacy.records": 80,
    "privacy.expected-batch": 80,
    "privacy.noise-multiplier": 3.0,
    "privacy.clip": 0.1,
    "train.weighting": "uniform",
    "train.steps": 1,
    "train.batch-size": 32,
    "num-server-rounds": 1,
    "rule.name": "ffa-lora",
    "lora.rank": 4,
    "task.max-length": 16,
}
KINDS = ["random", "mislabelled", "longest", "repeated", "shortest"]


@pytest.fixture(scope="module")
def own():
    return [{"text": record["text"][:300]} for record in stdlib.records()[:8]]


@pytest.fixture
def source(tmp_path, own):
    file = tmp_path / "own.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in own))
    return file


@pytest.fixture
def bench(tmp_path):
    def make(**changes):
        folder = tmp_path / f"bench-{random.getrandbits(32)}"
        folder.mkdir()
        return Bench(read_config(SMALL | changes), folder)

    return make


def canaries(bench, own, each=1):
    maker = Maker(bench.config, own)
    return [canary for kind in maker.kinds for canary in usable(bench, maker, kind, each)]


def bound(bench, own):
    node = bench.node(own)
    return invariants.bound(node, {"at first": node.initial()}, node.units.train, canaries(bench, own))


def silent(_):
    pass


def test_an_honest_node_passes_and_nothing_of_the_users_is_touched(source, capsys):
    before = source.read_bytes()
    written = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
    assert main(["audit", "--canaries", "50", *written, f"data.source={source}"]) == 0
    shown = capsys.readouterr().out
    for name in ("structure", "stability", "bound", "noise", "one-run"):
        assert f"  {name:10}  held" in shown, shown
    assert re.search(r"epsilon is at least [\d.]+ \(95 % sure\); 1.386 is claimed, at delta 1e-05", shown)
    assert all(f"    {kind:12} epsilon " in shown for kind in ("all", *KINDS))
    assert source.read_bytes() == before
    assert list(source.parent.iterdir()) == [source]
    assert not Path(node_config.STATE_DIRECTORY).exists()


def test_clipping_by_norms_that_vanish_is_found(bench, own, monkeypatch):
    """Squares in float32, of gradients so small that they are zero: what has no norm is not scaled down."""

    def clipped(self, gradients, whose):
        scaled = [1e-25 * gradient.flatten(1) for gradient in gradients.values()]
        squares = torch.stack([gradient.pow(2).sum(1) for gradient in scaled]).sum(0)
        factors = (self.bound / (squares.sqrt() / 1e-25)).clamp(max=1.0)
        return {p: torch.mv(g.flatten(1).T, factors).view_as(p).double() for p, g in gradients.items()}

    assert bound(bench(), own).held
    monkeypatch.setattr(Engine, "_clipped", clipped)
    found = bound(bench(), own)
    assert not found.held
    assert "C (" in found.said
    assert "epsilon 1.39 would be" in found.said


def test_a_split_whose_draw_depends_on_the_count_is_found(bench, own, monkeypatch):
    """As sources.split has it, which plain training uses: one record more deals all of them out anew."""
    halved = bench(**{"data.limit": 40})
    others = list(invariants.neighbours(own, canaries(halved, own), "record"))
    assert invariants.stability(halved, own, others).held

    def gathered(found, privacy, seed):
        places = [place / len(found) for place in range(len(found))]
        random.Random(f"{seed}/{len(found)}").shuffle(places)
        return [(place, [record]) for place, record in zip(places, found, strict=True)]

    monkeypatch.setattr(units, "_gathered", gathered)
    found = invariants.stability(halved, own, others)
    assert not found.held
    assert "units change with" in found.said


def test_an_error_that_one_record_makes_of_all_is_found(bench, own, monkeypatch):
    audited = bench()
    others = list(invariants.unreadable(own, audited.config))
    assert invariants.stability(audited, own, others).held

    def strict(record, task, tokenizer, most):
        return task.encode(record, tokenizer)[:most]

    monkeypatch.setattr(units, "_examples", strict)
    assert not invariants.stability(audited, own, others).held
    assert audited.failed


def test_a_word_that_the_records_choose_is_found(bench, own, monkeypatch):
    audited = bench()
    others = list(invariants.neighbours(own, canaries(audited, own)[:1], "record"))[:1]

    def told(self):
        return RecordDict({"node": ConfigRecord({"name": f"{len(self.units().train)} records", "rank": 4})})

    monkeypatch.setattr(Session, "answer_roll_call", told)
    found = invariants.structure(audited, own, others)
    assert (found.held, found.said) == (False, "what it sends differs, in content or form, with random added")


def test_the_sum_is_seen_before_the_step_scales_it(bench, own):
    """train.clip-norm comes after the noise, and would hide how much of it there is."""
    audited = bench(**{"privacy.clip": 2.0, "train.clip-norm": 1.0})
    node = audited.node(own)
    noised = invariants.noise(node, node.initial())
    assert noised.held, noised.said
    canary = canaries(audited, own)[:1]
    moved = invariants.bound(node, {"at first": node.initial()}, node.units.train, canary)
    assert moved.held
    assert "moved by 0.998 C at most" in moved.said


def test_a_tenth_of_the_noise_is_found(bench, own, monkeypatch):
    whole = gaussian.rounded_normal
    monkeypatch.setattr(gaussian, "rounded_normal", lambda n, scale, device: whole(n, scale / 10, device))
    audited = bench()
    node = audited.node(own)
    found = invariants.noise(node, node.initial())
    assert not found.held
    assert float(found.said.split()[0]) == pytest.approx(0.1, rel=0.05)
    guessed = trials.one_run(audited, own, canaries(audited, own, 20), 3, 0.95, silent)
    assert not guessed.held, guessed.said
    assert "1.386 is claimed" in guessed.said


@pytest.mark.exhaustive
@pytest.mark.parametrize(("share", "held"), [(1.0, True), (0.03, False)])
def test_pairs_of_runs_find_missing_noise(bench, own, monkeypatch, share, held):
    whole = gaussian.rounded_normal
    monkeypatch.setattr(gaussian, "rounded_normal", lambda n, scale, device: whole(n, scale * share, device))
    audited = bench(**{"privacy.noise-multiplier": 10.0})
    found = trials.paired(audited, own, canaries(audited, own), 40, 0.95, silent)
    assert found.held == held, found.said


@pytest.mark.slow
def test_a_whole_change_is_audited_in_pairs(source, capsys):
    changes = SMALL | {"privacy.mode": "update-local", "privacy.clip": 1.0}
    written = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    assert main(["audit", "--method", "paired", "--runs", "6", *written, f"data.source={source}"]) == 0
    shown = capsys.readouterr().out
    assert "  structure   held" in shown
    assert "  paired      held" in shown
    assert "stability" not in shown


TASKS = {
    "text": ({"text": "a b c d"}, KINDS),
    "instruct": ({"instruction": "Add", "input": "", "output": "1"}, ["longest"]),
    "classify": ({"text": "well", "label": 1}, KINDS),
    "chat": ({"messages": [{"role": "user", "content": "Add"}]}, ["longest"]),
    "multi-label": ({"text": "well", "label": ["1"]}, KINDS),
    "regress": ({"text": "well", "label": 1}, KINDS),
    "dpo": ({"instruction": "Add", "chosen": "1", "rejected": "2"}, KINDS),
    "embed": ({"anchor": "Add", "positive": "1", "negative": "2"}, KINDS),
}


@pytest.mark.parametrize(
    ("task", "unit"),
    [
        *((task, "record") for task in TASKS),
        ("text", "patient"),
        *(pytest.param(task, "patient", marks=pytest.mark.exhaustive) for task in list(TASKS)[1:]),
    ],
)
def test_every_task_has_canaries_that_the_node_uses(bench, task, unit):
    record, kinds = TASKS[task]
    changes = {
        "task.name": task,
        "task.max-length": 64,
        "task.negatives": "own",
        "privacy.unit": unit,
        "privacy.unit-cap": 2,
    }
    audited = bench(**changes)
    found = canaries(audited, [{**record, "patient": "7"}] * 2, each=2)
    assert set(kinds) <= {canary.kind for canary in found}
    for canary in found:
        assert len(canary.records) == (1 if unit == "record" else 3)
        assert len(canary.unit) == (1 if unit == "record" else 2)


@pytest.mark.parametrize(
    ("mode", "options", "expected"),
    [
        ("none", [], "a run without privacy has no promise"),
        ("update-central", [], "a node sends its change in the clear"),
        ("update-local", [], "one run says nothing about many canaries"),
        ("example", ["--confidence", "1"], "--confidence): expected a share between 0 and 1, got 1.0"),
        ("example", ["--policy", "/nowhere.toml"], "the node's policy cannot be read"),
    ],
)
def test_what_cannot_be_audited_is_refused_in_a_sentence(source, capsys, mode, options, expected):
    written = [f"{key}={json.dumps(value)}" for key, value in (SMALL | {"privacy.mode": mode}).items()]
    assert main(["audit", *options, *written, f"data.source={source}"]) == 2
    assert expected in capsys.readouterr().err


def test_the_bound_from_coins_is_the_papers():
    """Theorem 5.2 with scipy's binomial, as in the paper's appendix D."""

    def chance(m, r, v, epsilon, delta):
        q = 1 / (1 + 2.718281828459045**-epsilon)
        missed = max((binom.cdf(v - 1, r, q) - binom.cdf(v - 1 - i, r, q)) / i for i in range(1, v + 1))
        return binom.sf(v - 1, r, q) + 2 * m * delta * missed

    for m, r, v, delta in ((100, 50, 48, 1e-5), (1000, 300, 290, 1e-5), (200, 200, 140, 1e-4)):
        found = bounds.from_coins(m, r, v, delta, 0.05)
        assert chance(m, r, v, found, delta) == pytest.approx(0.05, rel=1e-4)
    assert bounds.from_coins(100, 50, 25, 1e-5, 0.05) == 0.0


def test_the_bound_from_pairs_is_clopper_and_pearsons():
    apart, delta = bounds.from_pairs([1.0] * 40, [0.0] * 40, 1e-5, 0.05), 1e-5
    at_least, at_most = beta.ppf(0.025, 20, 1), beta.ppf(0.975, 1, 20)
    assert 2.718281828459045**apart == pytest.approx((at_least - delta) / at_most, rel=1e-6)
    assert bounds.from_pairs([0.0, 1.0] * 20, [0.0, 1.0] * 20, 1e-5, 0.05) == 0.0
