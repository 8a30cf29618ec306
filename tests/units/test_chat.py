"""`bouquet chat`: one text, a conversation, a class."""

import io

import pytest
import torch
from transformers import TextStreamer

from common import tasks
from common.models import base
from common.models.adapted import LoraModel
from deploy.command import main
from tests.support.adapters import run_directory
from tests.support.architectures import tiny_bert


def test_an_answer_is_the_models_and_the_base_answers_beside_it(tmp_path, capsys):
    config, state = run_directory(tmp_path / "flu", **{"rule.name": "fedex-lora"})
    assert main(["chat", str(tmp_path / "flu"), "--prompt", "def get(self", "--base", "--tokens", "8"]) == 0
    adapted, plain = capsys.readouterr().out.split("with the adapter:\n")[1].split("the base model:\n")
    model = LoraModel(base.load(config.model, 0, torch.device("cpu")), config.lora)
    tokenizer = base.load_tokenizer(config.model)
    asked = tasks.build(config.task).ask("def get(self", tokenizer).tokens
    for shown, offset, scale in ((adapted, state.offset, state.scale), (plain, {}, 0.0)):
        model.install(state.adapter, scale, offset)
        model.network.eval()
        ids = torch.tensor([asked])
        output = model.network.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        assert tokenizer.decode(output[0, len(asked) :], skip_special_tokens=True).split() == shown.split()


def test_a_conversation_goes_on_after_a_text_that_is_too_long(tmp_path, capsys, monkeypatch):
    run_directory(tmp_path / "flu")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'word ' * 600}\n\nclass A\n/quit\nnever read\n"))
    assert main(["chat", str(tmp_path / "flu"), "--tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert said.count("the text is too long: expected fewer than 512 tokens") == 1
    assert said.count("> ") == 4


def test_a_classifier_gives_every_class_its_probability(tmp_path, capsys):
    settings = {"task.name": "classify", "task.labels": 3, "task.text-pair": "other", "lora.targets": "query"}
    run_directory(tmp_path / "pairs", **settings, **{"model.name": tiny_bert(tmp_path)})
    place = str(tmp_path / "pairs")
    assert main(["chat", place, "--prompt", "first\tsecond"]) == 0
    shares = [float(line.split()[1].strip("%")) for line in capsys.readouterr().out.splitlines()]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert main(["chat", place, "--prompt", "one"]) == 2
    assert "one text where two are compared: expected a tab between them, got 'one'" in capsys.readouterr().err
    assert main(["chat", place, "--base"]) == 2
    assert "the base model has no head of its own (--base)" in capsys.readouterr().err


def test_what_steers_a_terminal_is_not_shown(tmp_path, capsys, monkeypatch):
    run_directory(tmp_path / "flu")
    monkeypatch.setattr(TextStreamer, "put", lambda self, _: self.on_finalized_text("a\x1b[31m\x07b\n[bold]c"))
    assert main(["chat", str(tmp_path / "flu"), "--prompt", "a", "--tokens", "1"]) == 0
    assert "a\ufffd[31m\ufffdb\n[bold]c" in capsys.readouterr().out


def test_a_folder_that_is_torn_is_told(tmp_path, capsys):
    run_directory(tmp_path / "flu")
    (tmp_path / "flu/adapter/adapter_model.safetensors").write_bytes(b"torn")
    assert main(["chat", str(tmp_path / "flu"), "--prompt", "a"]) == 2
    assert "an adapter folder cannot be read" in capsys.readouterr().err
