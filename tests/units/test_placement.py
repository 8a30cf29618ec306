"""A base over several devices: which part lies where, and a base in which Accelerate moves tensors."""

import pytest
import torch
from accelerate import dispatch_model

from common.config.run import LoraConfig, ModelConfig
from common.error import BouquetError
from common.models import base, placement
from common.models.adapted import LoraModel
from tests.support.private_steps import ENGINES, EXAMPLES, clipped_sum, fresh, relative, scattered

CPU = torch.device("cpu")
GPUS = [torch.device("cuda", number) for number in range(3)]


@pytest.mark.parametrize("room", [[1.0, 1.0], [3.0, 1.0], [1.0, 1.0, 1.0], [1.0, 5.0, 2.0]])
def test_each_device_has_blocks_in_a_row_by_its_room(room):
    network = base.skeleton(ModelConfig(), 0)
    places = placement.split(network, GPUS[: len(room)], room)
    blocks = [places.pop(f"model.layers.{number}").index for number in range(len(network.model.layers))]
    assert blocks == sorted(blocks)
    assert places == dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], GPUS[0])
    whole, block = (sum(p.numel() for p in each.parameters()) for each in (network, network.model.layers[0]))
    for number, share in enumerate(room):
        held = block * blocks.count(number) + (whole - len(blocks) * block if number == 0 else 0)
        assert abs(held - whole * share / sum(room)) <= max(block, whole - len(blocks) * block)


@pytest.mark.parametrize("quantization", ["none", pytest.param("nf4", marks=pytest.mark.exhaustive)])
def test_a_model_that_accelerate_moves_tensors_in_trains_as_any_other(quantization):
    """On one CPU, where Accelerate's hooks stand on every block and move nothing."""
    network = base.load(ModelConfig.model_validate({"quantization": quantization}), 0, CPU, CPU)
    places = placement.split(network, [CPU, CPU], placement.rooms([CPU, CPU]))
    model = scattered(LoraModel(dispatch_model(network, places, force_hooks=True), LoraConfig(rank=8)))
    assert all(hasattr(block, "_hf_hook") for block in network.model.layers)
    plain = fresh(quantization)
    for each in (model, plain):
        each.train_only(each.keys)
    for engine in ENGINES:
        assert relative(clipped_sum(model, EXAMPLES, engine, 1.0), clipped_sum(plain, EXAMPLES, engine, 1.0)) < 1e-6
    model.resize(dict.fromkeys(model.layers, 3))
    assert model.spec.rank == 3


def test_what_cannot_be_split_is_named():
    with pytest.raises(BouquetError, match=r"a model without blocks cannot be split \(device\): got Linear\. Give the"):
        placement.split(torch.nn.Linear(2, 2), GPUS, [1.0] * 3)
    pooled = ModelConfig.model_validate({"pooling": "mean"})
    with pytest.raises(BouquetError, match=r"Bouquet's own head cannot be split .*expected one device, got cpu\+cpu"):
        base.load(pooled, 2, CPU, CPU)


def test_a_device_that_holds_nothing_is_refused():
    assert placement.find_devices("cpu + cuda:1") == [CPU, GPUS[1]]
    with pytest.raises(BouquetError, match=r"a device that stores nothing \(device\): .*got meta"):
        placement.find_devices("cpu+meta")
    with pytest.raises(BouquetError, match=r"an unknown device \(device\): .*got disk"):
        placement.find_devices("cpu+disk")
