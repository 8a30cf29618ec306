"""What Flower ships to the nodes, and what guards it there."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deploy.bundles.bundle import of_this_release
from deploy.command import main
from tests.support import ROOT

PACKAGES = ("common", "strategies", "client_app", "server_app")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> zipfile.ZipFile:
    source = tmp_path_factory.mktemp("app")
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.split():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    built = subprocess.run(
        [Path(sys.executable).with_name("flwr"), "build"], cwd=source, capture_output=True, text=True
    )
    (file,) = source.glob("*.fab")
    assert file.stat().st_size < 8_000_000, built.stdout
    return zipfile.ZipFile(file)


def test_every_module_and_the_embedded_model_ship_and_nothing_else(bundle):
    shipped = {name for name in bundle.namelist() if name.startswith(tuple(f"{package}/" for package in PACKAGES))}
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".py", ".json", ".jsonl", ".md"} and "__pycache__" not in path.parts
    }
    assert shipped == expected
    assert "common/models/embedded/weights.jsonl" in shipped
    others = {name.split("/")[0] for name in bundle.namelist()} - set(PACKAGES)
    assert others <= {"pyproject.toml", ".info", "README.md", "LICENSE"}, others


def test_the_embedded_model_is_found_in_the_installed_bundle(bundle, tmp_path):
    bundle.extractall(tmp_path / "app")
    script = "from common.models import embedded; print(embedded.unpack())"
    found = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, '.'); {script}"],
        cwd=tmp_path / "app",
        env={"PATH": "", "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert list((tmp_path / "cache/bouquet").glob("embedded-*"))


@pytest.mark.parametrize("app", ["server_app", "client_app"])
def test_another_package_of_the_same_name_is_named_at_import(app, tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "common/__init__.py").write_text("")
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.path.insert(0, {str(tmp_path)!r}); import {app}"
    failed = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert f"'common' is {tmp_path}/common, not Bouquet's own in {ROOT}; uninstall or rename" in failed.stderr


@pytest.mark.parametrize(
    ("imported", "not_needed"),
    [
        ("strategies", {"flwr", "transformers", "peft"}),
        # What a node works with: neither torch's compiler nor charts.
        ("client_app.session", {"torch._inductor.compile_fx", "flwr_datasets", "matplotlib"}),
    ],
)
def test_what_costs_seconds_to_import_is_imported_where_it_is_used(imported, not_needed):
    script = f"import {imported}, sys; print({not_needed} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert loaded.stdout.strip() == "set()", loaded.stdout + loaded.stderr


def test_a_bundle_that_was_sent_is_known_by_the_digest_of_its_files(bundle, tmp_path, capsys):
    """Packed otherwise it is the same one; with one byte more it is another."""
    same, other = tmp_path / "same.fab", tmp_path / "other.fab"
    for file, more in ((same, b""), (other, b"\n")):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:
            for number, name in enumerate(bundle.namelist()):
                packed.writestr(name, bundle.read(name) + (more if number == 0 else b""))
    said = []
    for file in (Path(str(bundle.filename)), same, other):
        assert main(["bundle", str(file)]) == 0
        said.append(capsys.readouterr().out)
    digests = [line.split()[0] for line in said]
    assert said[1] == f"{digests[1]}  # same.fab\n"
    assert digests[0] == digests[1] == of_this_release() != digests[2]
