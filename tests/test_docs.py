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
    variables = os.environ | {"PATH": path}
    command = ["bash", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-out accuracy" in done.stdout
    assert (tmp_path / "runs/tickets/adapter/adapter_model.safetensors").is_file()
    assert "epsilon" in done.stdout


def test_links_between_the_documents_lead_somewhere():
    for document in (*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
