"""Checkpoints: which is the newest, which are kept, and that nothing altered or of another release is taken for one."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file

from common.adapter.algebra import digest
from common.adapter.values import Key, State
from common.error import BouquetError
from common.record import checkpoint

WEIGHTS = {Key("l", "A"): torch.arange(6.0).view(2, 3), Key("l", "B"): torch.ones(3, 2)}


def state(round: int) -> State:
    return State(WEIGHTS, 0.5, round, seed=7)


def test_rounds_of_five_digits_come_after_those_of_four(tmp_path):
    for number in (9_999, 10_000, 10_001):
        checkpoint.save(tmp_path, state(number), "fedit")
    assert checkpoint.rounds(tmp_path) == [9_999, 10_000, 10_001]
    assert checkpoint.latest(tmp_path, "fedit").round == 10_001
    checkpoint.prune(tmp_path, newest=1, every=0)
    assert checkpoint.rounds(tmp_path) == [10_001]


@pytest.mark.parametrize(
    ("newest", "every", "also", "kept"),
    [(3, 0, (), [8, 9, 10]), (1, 4, (), [4, 8, 10]), (2, 0, (3,), [3, 9, 10]), (20, 0, (), list(range(1, 11)))],
)
def test_the_newest_are_kept_and_those_that_were_asked_for(newest, every, also, kept, tmp_path):
    for number in range(1, 11):
        checkpoint.save(tmp_path, state(number), "fedit")
    checkpoint.prune(tmp_path, newest, every, also)
    assert checkpoint.rounds(tmp_path) == kept


def test_no_bit_of_a_checkpoint_changes_unnoticed(tmp_path):
    """Whatever is not refused is what was written: a flip may fall where safetensors has only spaces."""
    whole = checkpoint.save(tmp_path, state(3), "fedit").read_bytes()
    dice, refused = random.Random(0), 0
    for bit in dice.sample(range(8 * len(whole)), 400):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file = tmp_path / "flipped.safetensors"
        file.write_bytes(flipped)
        try:
            read = checkpoint.load(file, "fedit")
        except BouquetError:
            refused += 1
        else:
            assert (read.round, read.scale, read.seed, digest(read.adapter)) == (3, 0.5, 7, digest(WEIGHTS))
    assert refused > 350


def test_a_checkpoint_of_another_release_is_refused_in_a_sentence(tmp_path):
    """As 0.1.0 wrote them, and as one after this might."""
    former = {"round": 2, "scale": 0.5, "rule": "fedit", "digest": digest(WEIGHTS)}
    later = {"format": 3, "round": 3, "scale": 0.5, "rule": "fedit", "seed": 7}
    for facts, number in ((former, "1"), (later, "3")):
        tensors = {str(key): tensor for key, tensor in WEIGHTS.items()}
        metadata = {"bouquet": json.dumps(facts), "digest": "of another form"}
        save_file(tensors, checkpoint.file_of(tmp_path, facts["round"]), metadata=metadata)
        said = (
            rf"a checkpoint of another release \(.*\): expected format 2, got {number}\. Use the release that wrote it"
        )
        with pytest.raises(BouquetError, match=said):
            checkpoint.load(checkpoint.file_of(tmp_path, facts["round"]), "fedit")
    with pytest.raises(
        BouquetError, match=r"no checkpoint of this run can be read .*Resume with the release and the rule"
    ):
        checkpoint.latest(tmp_path, "fedit")


def test_a_checkpoint_of_another_rule_is_refused(tmp_path):
    file = checkpoint.save(tmp_path, state(1), "fedit")
    with pytest.raises(BouquetError, match=r"a checkpoint of another rule .*expected flora, got fedit"):
        checkpoint.load(file, "flora")
