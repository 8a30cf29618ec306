"""What the documentation tells a reader to type, works."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.slow
def test_the_commands_of_your_data_work_one_after_the_other(tmp_path):
    blocks = re.findall(r"<!-- run -->\n```sh\n(.*?)```", (DOCS / "your-data.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "set -e\n" + "".join(blocks)
    variables = {**os.environ, "PATH": path}
    variables.pop("PYTHONUNBUFFERED", None)
    said, finished = "", []
    with subprocess.Popen(
        ["bash", "-c", script], cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            said += line
            if line.startswith("round "):
                finished.append((tmp_path / "runs/tickets/summary.json").exists())
    assert process.returncode == 0, said
    assert len(finished) == 2
    assert not finished[0], "a round is told when it is done, not when all are"
    assert "held-out accuracy" in said
    assert (tmp_path / "runs/tickets/adapter/adapter_model.safetensors").is_file()
    assert "epsilon" in said


def test_links_between_the_documents_lead_somewhere():
    for document in (*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
