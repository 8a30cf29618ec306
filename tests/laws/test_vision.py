"""Models that see images: what they make of a batch, of LoRA and of privacy, beside Transformers' and PEFT's own."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from common.adapter.values import State
from common.error import BouquetError
from common.models import base, lengths
from common.models.adapted import LoraModel
from common.models.coverage import coverage
from common.models.packing import Packing
from common.record.export import export
from common.sources import dealing
from common.tasks.task import IGNORED
from tests.support import vision
from tests.support.private_steps import brute_force, relative
from tests.support.seeing import KINDS, data, examples, loaded, settings
from tests.support.training import train_plainly

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_an_examples_loss_and_gradient_are_the_same_alone_and_in_a_batch(kind: str, quantisation: str) -> None:
    config = settings(kind, quantisation)
    (task, chosen), model = examples(config), loaded(config)
    model.network.eval()
    parameters = model.train_only(model.keys)
    expected = brute_force(model, parameters, chosen, task).sum(0)
    for size in (1, 8):
        for first in range(0, len(chosen), size):
            task.losses(model.outputs(task.collate(chosen[first : first + size], model.pad))).sum().backward()
        got = torch.cat([parameter.grad.double().flatten() for parameter in parameters])
        model.network.zero_grad(set_to_none=True)
        assert relative(got, expected) < 1e-5
    with torch.no_grad():
        together = task.losses(model.outputs(task.collate(chosen, model.pad)))
        alone = torch.cat([task.losses(model.outputs(task.collate([each], model.pad))) for each in chosen])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@kinds
def test_tokens_pixels_and_loss_are_transformers_own(kind: str) -> None:
    """Its processor reads the template's text and the image files; its model has a loss of its own."""
    config = settings(kind)
    task, chosen = examples(config)
    network = base.load(config.model, 0, torch.device("cpu")).eval()
    model, processor = LoraModel(network, config.lora), AutoProcessor.from_pretrained(config.model.name)
    folder, parts = data().parent, base.load_tokenizer(config.model).chat_template == vision.PARTS
    for record, example in list(zip(dealing.read(str(data())), chosen, strict=True))[:4]:
        question, answer = record.found["instruction"], record.found["output"]
        if parts:
            shown = [{"type": "image"}, {"type": "text", "text": question}]
            turns = [
                {"role": "user", "content": shown},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        else:
            turns = [
                {"role": "user", "content": f"{processor.image_token}\n{question}"},
                {"role": "assistant", "content": answer},
            ]
        text = processor.apply_chat_template(turns, tokenize=False)
        image = Image.open(folder / record.found["image"])
        inputs = processor(text=text, images=[image], return_tensors="pt", add_special_tokens=False)
        batch = task.collate([example], model.pad)
        for name, value in inputs.items():
            torch.testing.assert_close(batch[name], value, rtol=0, atol=0 if name != "pixel_values" else 1e-5)
        learned = torch.tensor(example.labels) != IGNORED
        labels = torch.where(learned, inputs["input_ids"], IGNORED)
        with torch.no_grad():
            theirs = network(**inputs, labels=labels).loss
            ours = task.losses(model.outputs(batch))
        torch.testing.assert_close(ours[0], theirs, rtol=1e-5, atol=1e-5)


@kinds
def test_words_are_packed_and_scored_apart_and_what_sees_is_left_alone(kind: str) -> None:
    """The largest list of blocks may be the tower's: there are no texts in it."""
    config = settings(kind)
    (task, chosen), model = examples(config), loaded(config)
    model.network.eval()
    layer = next(iter(model.layers.values()))
    seen = []
    handle = layer.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0].shape[:2]))
    batch = task.collate(chosen, model.pad)
    with torch.no_grad():
        packed = model.outputs(batch)
        with model.padded():
            padded = model.outputs(batch)
        whole = model.logits(batch)
    handle.remove()
    assert seen[:2] == [(1, sum(map(len, (each.tokens for each in chosen)))), tuple(batch["input_ids"].shape)]
    torch.testing.assert_close(packed.values, padded.values, rtol=1e-5, atol=1e-5)
    losses = nn.functional.cross_entropy(whole[:, :-1].mT, batch["labels"][:, 1:], reduction="none")
    torch.testing.assert_close(packed.values[:, 1:], losses, rtol=1e-5, atol=1e-5)
    assert model._token_losses is not None
    assert model._token_losses._apart, "no logits are computed of an image's tokens"


@kinds
def test_words_alone_are_learned_too(kind: str) -> None:
    config = settings(kind, "nf4", **{"task.name": "instruct"})
    task, model = lengths.widest(config), loaded(config)
    assert not task.sees
    records = [{"instruction": "Say " + "so " * number, "output": "so"} for number in range(5)]
    words = base.load_tokenizer(config.model)
    chosen = [example for record in records for example in task.encode(record, words)]
    assert ["Say so so" in words.decode(example.tokens) for example in chosen] == [False, False, True, True, True]
    model.network.eval()
    with torch.no_grad():
        together = task.losses(model.outputs(task.collate(chosen, model.pad)))
        alone = torch.cat([task.losses(model.outputs(task.collate([each], model.pad))) for each in chosen])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    before = model.tensors()
    train_plainly(model, task, chosen, config.train)
    assert not [key for key, tensor in model.tensors().items() if torch.equal(tensor, before[key])]


def test_the_blocks_are_the_language_models_however_large_the_tower_is(tmp_path: Path) -> None:
    place = vision.save_llava(tmp_path, tower={"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4})
    network = base.load(settings("llava", **{"model.name": str(place)}).model, 0, torch.device("cpu"))
    packing = Packing(network)
    assert packing.works
    assert packing._blocks == list(network.model.language_model.layers)


WANTED = {
    "all-linear": (14, {"model.language_model"}),
    "q_proj,v_proj": (4, {"model.language_model"}),
    "vision_tower": (12, {"model.vision_tower"}),
    "all-linear,multi_modal_projector": (16, {"model.language_model", "model.multi_modal_projector"}),
    "q_proj,vision_tower,multi_modal_projector": (
        16,
        {"model.language_model", "model.vision_tower", "model.multi_modal_projector"},
    ),
    "model.multi_modal_projector.linear_1": (1, {"model.multi_modal_projector"}),
    "vision_tower.encoder.layers.0": (6, {"model.vision_tower"}),
}


@pytest.mark.parametrize("targets", WANTED)
def test_the_language_model_is_adapted_and_what_sees_where_it_is_named(targets: str) -> None:
    config = settings("llava", "nf4", **{"lora.targets": targets})
    (task, chosen), model = examples(config), loaded(config)
    number, where = WANTED[targets]
    assert len(model.spec.layers) == number
    assert {".".join(layer.split(".")[:2]) for layer in model.spec.layers} == where
    before = model.tensors()
    train_plainly(model, task, chosen, config.train)
    # A LLaVA takes what the tower says before its last layer, which therefore learns nothing.
    still = {key.layer for key, tensor in model.tensors().items() if torch.equal(tensor, before[key])}
    assert still == {layer for layer in model.spec.layers if ".vision_tower.encoder.layers.1." in layer}


def test_a_name_that_there_is_not_is_answered_with_those_that_there_are() -> None:
    config = settings("llava", **{"lora.targets": "fc1"})
    with pytest.raises(
        BouquetError, match=r"no such layer.*'all-linear' or some of .*up_proj, .*vision_tower, got fc1"
    ):
        loaded(config)


@pytest.mark.parametrize("targets", ["all-linear", "all-linear,vision_tower,multi_modal_projector"])
def test_the_shares_that_a_run_tells_are_those_of_the_loaded_model(targets: str) -> None:
    config = settings("llava", "nf4", **{"lora.targets": targets})
    model, skeleton = loaded(config), base.skeleton(config.model, 0)
    whole = sum(parameter.numel() for parameter in skeleton.parameters())
    held = [module.weight.quant_state.shape for module in model.network.modules() if isinstance(module, Linear4bit)]
    told = coverage(skeleton, model.spec.layers, "nf4")
    assert told.quantised == pytest.approx(sum(d_out * d_in for d_out, d_in in held) / whole)
    assert told.adapted == pytest.approx(sum(d_out * d_in for d_out, d_in in model.spec.layers.values()) / whole)
    assert 0 < told.adapted <= told.quantised < 1


@kinds
@pytest.mark.parametrize("targets", ["all-linear", "all-linear,visual,vision_tower,multi_modal_projector"])
def test_plain_peft_loads_what_a_model_leaves(kind: str, targets: str, tmp_path: Path) -> None:
    if kind == "qwen2-vl":
        targets = targets.replace(",vision_tower,multi_modal_projector", "")
    else:
        targets = targets.replace("visual,", "")
    config = settings(kind, **{"lora.targets": targets})
    (task, chosen), model = examples(config), loaded(config)
    train_plainly(model, task, chosen, config.train)
    export(State(model.tensors(), config.lora.scale, 1), config, tmp_path, with_head=True)
    network = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(config.model.name), str(tmp_path))
    model.network.eval()
    batch = task.collate(chosen[:1], model.pad)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(**inputs).logits, model.logits(batch), rtol=1e-4, atol=1e-5)


def test_another_way_to_show_an_image_is_another_base(tmp_path: Path) -> None:
    def digest(place: Path) -> str:
        for known in (base.digest, base.load_tokenizer):
            known.cache_clear()
        return base.digest(settings("llava", **{"model.name": str(place)}).model)

    place = vision.save_llava(tmp_path)
    before, file = digest(place), place / "processor_config.json"
    facts = vision.json.loads(file.read_text())
    file.write_text(vision.json.dumps(facts))
    assert digest(place) == before, "it is read, and not compared by its bytes"
    facts["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    file.write_text(vision.json.dumps(facts))
    assert digest(place) != before
