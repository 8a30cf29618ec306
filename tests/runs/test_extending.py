"""The members that docs/extending.md shows: each is lawful where it stands, and a run trains with it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.tasks import TASKS
from strategies import AXES

ROOT = Path(__file__).parents[2]
COPIED = ("common", "strategies", "client_app", "server_app", "deploy", "tests", "pyproject.toml")
MOST_LINES = 40

RUNS = {
    "rule and init": {"rule.name": "ffb-lora"},
    "mean": {"mean.name": "geometric"},
    "server optimizer": {"server-optimizer.name": "yogi"},
    "structure": {"adapter.name": "svd"},
    "optimizer": {"optimizer.name": "amsgrad"},
    "objective": {"objective.name": "shrink"},
    "gradient": {"gradient.name": "mezo", "train.learning-rate": 0.001},
    "keep": {"rule.name": "shared-b"},
    "codec": {"wire.up": "fp8"},
    "task": {"task.name": "backwards"},
}
TRAINED = """
import json, sys
from pathlib import Path
from tests.support.grid import OPEN, run_in_process
from common.config.run import RunConfig
from strategies.registries import defaults

folder = Path(sys.argv[1])
pairs = [{"text": f"def f{n}(self): return {n}", "instruction": f"{n} + 1", "output": str(n + 1)} for n in range(24)]
(folder / "records.jsonl").write_text("\\n".join(map(json.dumps, pairs)))
small = {
    "run-directory": str(folder), "data.source": str(folder / "records.jsonl"), "data.partition": "iid",
    "num-server-rounds": 2, "train.steps": 6, "train.batch-size": 4, "evaluation.every": 0,
    "evaluation.limit": 8, "evaluation.prompt": "",
}
for name, changes in json.loads(sys.argv[2]).items():
    flat = RunConfig().to_flower() | defaults() | small | {"run-name": name.replace(" ", "-")} | changes
    run_in_process(flat, nodes=2, node_config={n: {"state-directory": str(folder / "state")} for n in range(2)})
"""


def blocks() -> Iterator[tuple[str, str, str]]:
    """Each file that the page shows: its path, its registry, and its text."""
    page = (ROOT / "docs/extending.md").read_text()
    yield from re.findall(r"<!-- (\S+\.py): (\w+) -->\n```python\n(.*?)```", page, flags=re.DOTALL)


def register(tree: Path, path: str, registry: str, text: str) -> None:
    """Write a member into a tree, and add its one line to the registry beside it."""
    (tree / path).write_text(text)
    (member,) = re.findall(r"^class (\w+)\(", text, flags=re.MULTILINE)
    named = re.compile(rf"^{registry}\b.*= ", re.MULTILINE)
    (home,) = [file for file in (tree / path).parent.glob("*.py") if named.search(file.read_text())]
    before, found, after = home.read_text().partition(named.search(home.read_text()).group())
    place, more = ("default=", f"{member}, default=") if "Registry" in after[:20] else ("(Text,", f"(Text, {member},")
    module = path.removesuffix(".py").replace("/", ".")
    home.write_text(f"from {module} import {member}\n{before}{found}{after.replace(place, more, 1)}")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    for block in blocks():
        register(tree, *block)
    return tree


def run(tree: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-3000:]
    return finished.stdout


def test_every_axis_is_shown_in_few_lines():
    shown = {registry: text for _, registry, text in blocks()}
    assert set(shown) == {
        *("RULES", "INITS", "MEANS", "SERVER_OPTIMIZERS", "STRUCTURES", "OPTIMIZERS"),
        *("OBJECTIVES", "GRADIENTS", "KEEPS", "CODECS", "TASKS"),
    }
    for _, _, text in blocks():
        code = [line for line in text.split('"""', 2)[2].splitlines() if line.strip()]
        assert len(code) < MOST_LINES


def test_none_takes_the_place_of_what_is_there():
    """Neither its file nor its name: whoever follows the page would break what they have."""
    for path, registry, text in blocks():
        assert not (ROOT / path).exists(), path
        (name,) = re.findall(r'^    name = "(.+)"$', text, flags=re.MULTILINE) or [""]
        assert name not in {*TASKS, *(member for axis in AXES for member in axis)}, registry


@pytest.mark.slow
def test_the_laws_hold_for_them(tree):
    said = run(tree, "-m", "pytest", "-q", "tests/laws/test_rules.py", "-k", "ffb-lora or shared-b")
    assert "[100%]" in said


@pytest.mark.slow
def test_a_run_trains_with_each(tree, tmp_path):
    run(tree, "-c", TRAINED, str(tmp_path), json.dumps(RUNS))
    for name in RUNS:
        summary = json.loads((tmp_path / name.replace(" ", "-") / "summary.json").read_text())
        # Two rounds of random directions are too few for a model to learn by them.
        assert summary["after"]["all"] < summary["before"]["all"] * (1.01 if name == "gradient" else 1), name
