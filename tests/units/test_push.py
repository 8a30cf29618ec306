"""`bouquet export --push`, against a hub on this machine."""

import pytest
from safetensors.torch import load

from common.config.run import ModelConfig
from common.error import BouquetError
from common.record.export import read
from deploy.command import main
from deploy.export import push
from tests.support.adapters import run_directory
from tests.support.hub import serving

# huggingface_hub's own call of httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
SECRET = "hf_a_secret_of_mine"
ON_HUB = ModelConfig(name="some/base")


@pytest.fixture
def hub(monkeypatch):
    with serving(SECRET, "my-lab") as hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        yield hub


def exported(tmp_path, *arguments):
    run_directory(tmp_path / "run")
    prompts = ["--prompt", "def get(self", "--prompt", "import os"]
    return main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "out"), *prompts, *arguments])


def test_an_export_is_published_with_its_card(hub, tmp_path, capsys):
    assert exported(tmp_path, "--form", "merged", "--push", "my-lab/flu", "--private") == 0
    said = capsys.readouterr()
    assert f"published: {hub.address}/my-lab/flu" in said.out
    assert hub.private == {"my-lab/flu": True}
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert hub.files["my-lab/flu"] == files
    assert load(hub.files["my-lab/flu"]["model.safetensors"])
    card = files["README.md"].decode()
    assert "# my-lab/flu" in card
    assert 'AutoModelForCausalLM.from_pretrained("my-lab/flu", dtype="auto")' in card
    assert SECRET not in said.out + said.err


def test_an_adapter_is_published_again_to_the_same_repository(hub, tmp_path):
    run_directory(tmp_path / "run")
    folder = tmp_path / "run" / "adapter"
    for _ in range(2):
        assert push.push(folder, "my-lab/flu", private=False) == f"{hub.address}/my-lab/flu"
    assert set(hub.files["my-lab/flu"]) == {"adapter_config.json", "adapter_model.safetensors", "bouquet.json"}
    again = tmp_path / "again"
    again.mkdir()
    for name, content in hub.files["my-lab/flu"].items():
        (again / name).write_bytes(content)
    assert read(again).settings == read(folder).settings
    assert read(again).state.adapter.keys() == read(folder).state.adapter.keys()
    with pytest.raises(
        BouquetError, match=r"a public repository with this name exists \(--push my-lab/flu --private\)"
    ):
        push.push(folder, "my-lab/flu", private=True)


def test_a_wrong_token_is_told_before_anything_is_computed_and_never_shown(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_another_secret")
    assert exported(tmp_path, "--form", "merged", "--push", "my-lab/flu") == 2
    said = capsys.readouterr()
    assert (
        "the hub does not accept the token (--push my-lab/flu): got HTTP 401. Log in with 'hf auth login'" in said.err
    )
    assert "secret" not in said.out + said.err
    assert not (tmp_path / "out").exists()
    assert not hub.private


def test_whatever_else_is_wrong_is_told_too(hub, tmp_path, monkeypatch):
    run_directory(tmp_path / "run")
    with pytest.raises(BouquetError, match=r"the token may not write there .*HTTP 403.*hf upload others/flu /"):
        push.push(tmp_path / "run" / "adapter", "others/flu", private=False)
    hub.full = True
    with pytest.raises(
        BouquetError, match=r"broke off the transfer .*got HfHubHTTPError. The export is in .*hf upload my-lab"
    ):
        push.push(tmp_path / "run" / "adapter", "my-lab/flu", private=False)
    assert "my-lab/flu" not in hub.files
    for wrong in ("flu", "a/b/c", "my lab/flu", "/flu"):
        with pytest.raises(BouquetError, match="not a repository name"):
            push.check(wrong, ON_HUB, merged=False)
    with pytest.raises(BouquetError, match=r"a base that is not on the hub .*'embedded', on this machine. Give its"):
        push.check("my-lab/flu", ModelConfig(), merged=False)
    push.check("my-lab/flu", ModelConfig(), merged=True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(BouquetError, match=r"there is no hub token \(--push\). Log in with 'hf auth login'"):
        push.check("my-lab/flu", ON_HUB, merged=False)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BouquetError, match=r"the hub cannot be reached.* \(http://127.0.0.1:9\): got ConnectError"):
        push.check("my-lab/flu", ON_HUB, merged=False)


def test_private_without_a_push_is_a_slip(tmp_path, capsys):
    assert exported(tmp_path, "--private") == 2
    assert "nothing is published (--private): expected --push OWNER/NAME" in capsys.readouterr().err
