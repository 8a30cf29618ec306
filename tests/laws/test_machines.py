"""What two machines compute and compare by bits depends on neither's threads nor its CPU.

Merges go through LAPACK and BLAS: their bits are the same for any number of threads, and only on one kind of CPU.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.support import ROOT

COMPUTED = """
import json
import torch
from common.adapter.values import LayerShape
from common.adapter.spec import Spec
from common.adapter.algebra import digest
from tests.support.factors import LAWFUL, after_a_round, initial, trained

starts, merges = {}, {}
for name, rule in LAWFUL.items():
    start = initial(rule, Spec({"l": LayerShape(1024, 2048)}, {}, 32, 2.0, rule.structure), seed=7)
    starts[name] = digest(start.adapter)
    state = after_a_round(rule, {"l": LayerShape(320, 224), "m": LayerShape(224, 320)}, 32, nodes=3)
    merges[name] = digest(state.adapter | state.offset)
print(json.dumps({"starts": starts, "merges": merges, "threads": torch.get_num_threads()}))
"""


def computed(**environment: str) -> dict:
    run = subprocess.run(
        [sys.executable, "-c", COMPUTED],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def here() -> dict:
    return computed(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has one thread")
def test_starts_and_merges_are_the_same_for_any_number_of_threads(here):
    other = computed(OMP_NUM_THREADS="2", MKL_NUM_THREADS="2")
    assert (here["threads"], other["threads"]) == (1, 2)
    assert other["starts"] == here["starts"]
    assert other["merges"] == here["merges"]


def test_starts_are_the_same_on_a_cpu_without_wide_vectors(here):
    other = computed(OMP_NUM_THREADS="1", ATEN_CPU_CAPABILITY="default", MKL_ENABLE_INSTRUCTIONS="SSE4_2")
    assert other["starts"] == here["starts"]
