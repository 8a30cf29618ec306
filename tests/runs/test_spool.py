"""The server's memory while replies come in: it must not grow with their number."""

import json
import os
import subprocess
import sys

import pytest
import torch

from common.adapter.values import Key, Update
from server_app.spool import Spool

FLOOD = """
import resource, sys, torch
from pathlib import Path
from common.adapter.values import Key, LayerShape, Update
from common.adapter.spec import Spec
from server_app.spool import Spool
from strategies import Recipe
from strategies.rules import FedIT
from strategies.meter import aggregation_error

nodes = int(sys.argv[2])
rule = FedIT()
state = Recipe.around(rule).start(Spec({f"l{n}": LayerShape(4096, 4096) for n in range(20)}, {}, 16, 1.0), seed=0)
size = sum(t.nbytes for t in state.adapter.values())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Spool(Path(sys.argv[1])) as spool:
    for node in range(nodes):
        tensors = {key: tensor + (node + 1) * 1e-3 for key, tensor in state.adapter.items()}
        spool.put(f"node-{nodes - node:04d}", Update(tensors, 1.0, 1.0))
    merged = rule.aggregate(state, spool)
    errors = aggregation_error(rule, state, spool, merged)
print(size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, errors[""])
"""


@pytest.mark.slow
def test_replies_of_ten_megabytes_stay_on_disk(tmp_path):
    command = [sys.executable, "-c", FLOOD, str(tmp_path / "spool"), os.environ.get("REPLIES", "100")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size, grown, error = map(float, done.stdout.split())
    assert size > 10e6
    assert grown < 300e6
    assert 0 < error < 1
    assert not (tmp_path / "spool").exists()


def test_updates_come_back_whole_in_the_order_of_the_names_and_again(tmp_path):
    updates = {
        name: Update({Key("a.b", "A"): torch.full((2, 3), float(weight))}, weight, 0.5, slots)
        for name, weight, slots in (("b", 2.0, (1, 3)), ("a", 1.0, ()))
    }
    with Spool(tmp_path / "spool") as spool:
        for name, update in updates.items():
            spool.put(name, update)
        for _ in range(2):
            back = list(spool)
            assert [update.weight for update in back] == [1.0, 2.0]
            assert [update.slots for update in back] == [(), (1, 3)]
            assert torch.equal(back[1].tensors[Key("a.b", "A")], torch.full((2, 3), 2.0))


def test_a_spool_that_a_crash_left_behind_is_emptied(tmp_path):
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool/000000.safetensors").write_text(json.dumps("torn"))
    with Spool(tmp_path / "spool") as spool:
        assert list(spool) == []
