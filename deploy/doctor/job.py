"""What a run needs of a machine: its model, its data, its memory, and the bytes of a round."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from client_app import trainer
from client_app.policy import Policy
from common import readable, tasks
from common.adapter.spec import Spec
from common.config.node import NodeConfig
from common.config.run import RunConfig
from common.error import BouquetError
from common.models import adapted, base, lengths, placement
from common.privacy.dataset import canonical
from common.sources import dealing
from common.sources.records import content, fields
from strategies import Recipe
from strategies.cost import planned_bytes
from strategies.strategy import share_of

# Weights in four bits with double quantisation: 4.127 bits (Dettmers et al., arXiv:2305.14314, section 3). GPTQ and AWQ
# have 16 bits of scale and 4 of zero point for 128 weights.
BYTES_A_WEIGHT = {"nf4": 4.127 / 8, "int8": 1.0, "gptq": (4 + 20 / 128) / 8, "awq": (4 + 20 / 128) / 8}
# A weight of the adapter, its gradient and AdamW's two moments, in float32.
BYTES_A_TRAINED_WEIGHT = 16
# Python, its libraries and, on a GPU, the CUDA context.
PROCESS = 1.2e9


def model(config: RunConfig) -> str:
    """The base model: embedded, a folder, or whole in the hub cache."""
    where = base.location(config.model.name)
    if not Path(where).is_dir():
        try:
            where = snapshot_download(where, revision=config.model.revision, local_files_only=True)
        except (LocalEntryNotFoundError, ValueError) as error:
            raise BouquetError(
                "the model is not on this machine",
                where="model.name",
                got=config.model.name,
                cure=f"hf download {config.model.name} --revision {config.model.revision}",
            ) from error
    weights = [file for file in Path(where).iterdir() if file.suffix in {".safetensors", ".bin"}]
    if not weights:
        raise BouquetError("a model without weights", where=where, expected="*.safetensors", cure="Download it again.")
    base.load_tokenizer(config.model)
    return f"{config.model.name}, {sum(file.stat().st_size for file in weights) / 1e9:.2f} GB of weights"


def data(config: RunConfig, node: NodeConfig) -> str:
    """Every record of the node against the task's schema, or what its script hands over.

    Raises :class:`BouquetError` with the first records that fail, and whatever the script raises.
    """
    if node.script:
        return _script(config, node.script)
    source = node.data or config.data.source
    found = list(dealing.each(source))
    good = [placed for placed in found if not isinstance(placed.found, BouquetError)]
    tokenizer = base.load_tokenizer(config.model)
    task = lengths.widest(config, source)
    task.check(fields(good), where=source)
    counts = tasks.encoded(task, found, tokenizer)[1]
    unit = config.privacy.unit if config.privacy.per_example else "record"
    nobody = sum(not canonical(content(placed).get(unit)) for placed in good) if unit != "record" else 0
    if nobody == len(good) and unit != "record":
        raise BouquetError(
            "no record says whom it belongs to",
            where=f"{source}, privacy.unit",
            expected=f"the field '{unit}'",
            got="no record with it",
            cure="Name the field that holds the person, or 'record', in the run and in the policy.",
        )
    own = len(dealing.node_records(config.data, node, config.seed))
    unnamed = f"; {nobody:,} have no '{unit}' and are left out" if nobody else ""
    return f"{source}: {counts}, {counts.examples:,} examples; this node trains on {own:,} records{unnamed}"


def _script(config: RunConfig, script: str) -> str:
    try:
        own = trainer.fitting(script, config)
    except BouquetError:
        raise
    except Exception as error:  # a boundary: whatever it raises, the script is what does not work
        raise BouquetError("the node's script fails", where=script, got=f"{type(error).__name__}: {error}") from error
    return f"{script}: a {type(own).__name__} that fits the run, with {len(own.train_dataset):,} examples"


def policy(config: RunConfig, node: NodeConfig) -> str:
    """The run against what the node allows. Raises :class:`RefusalError` with everything that it does not."""
    own, recipe = Policy.of(node), Recipe.build(config)
    own.check_run(recipe, node)
    own.check_size(recipe, node.lora_rank or config.lora.rank)
    return f"{node.policy or 'no policy file, which allows what is harmless'}: the run is allowed"


def memory(config: RunConfig, node: NodeConfig) -> str:
    """An estimate of what training takes, against what is free: for each of the node's processes, where it computes."""
    length = _length(config, node)
    config = config.model_copy(update={"task": config.task.model_copy(update={"max_length": length})})
    return "; ".join(_memory(config, node, place, number) for place, number in Counter(node.devices).items())


def _memory(config: RunConfig, node: NodeConfig, place: str, processes: int) -> str:
    """What so many processes take on one device, or on those that each is split over."""
    devices, length = placement.find_devices(place), config.task.max_length
    gpu = devices[0].type == "cuda"
    need = processes * estimate(config, node.lora_rank or config.lora.rank, gpu)
    free = float(psutil.virtual_memory().available)
    if gpu:
        free = float(sum(torch.cuda.mem_get_info(device)[0] for device in devices))
    where = "+".join(map(str, devices)) + (f", {processes} processes" if processes > 1 else "")
    if need > free:
        raise BouquetError(
            "too little memory for this run",
            where=f"{where}, batch {config.train.batch_size}, sequence {length}",
            expected=f"about {need / 1e9:.1f} GB",
            got=f"{free / 1e9:.1f} GB free",
            cure="Lower train.batch-size (and raise train.accumulation) or task.max-length, "
            "or set model.gradient-checkpointing=true.",
        )
    return f"about {need / 1e9:.1f} GB of {free / 1e9:.1f} GB free on {where}"


def _length(config: RunConfig, node: NodeConfig) -> int:
    """The most tokens of an example on this node."""
    if config.privacy.on or config.task.max_length or node.script:
        return lengths.widest(config).length
    found, source = dealing.node_records(config.data, node, config.seed), node.data or config.data.source
    return lengths.fitted(config.task, config.model, found, base.load_tokenizer(config.model), source).length


def estimate(config: RunConfig, rank: int, gpu: bool) -> float:
    """Bytes that training takes: weights, adapter, optimizer, activations and logits.

    Activations of a layer are ``T B (34 H + 5 a T)`` bytes in 16 bits (Korthikanti et al., arXiv:2205.05198, eq. 1),
    for B rows of a batch, sequence T, width H and a heads; with checkpointing, one layer's and every layer's input.
    """
    classes = tasks.classes(config.task)
    skeleton = base.skeleton(config.model, classes)
    wide = 2.0 if gpu else 4.0
    linear = sum(module.weight.numel() for module in skeleton.modules() if isinstance(module, nn.Linear))
    whole = sum(parameter.numel() for parameter in skeleton.parameters())
    weights = linear * BYTES_A_WEIGHT.get(config.model.quantization, wide) + (whole - linear) * wide
    whole_config: Any = skeleton.config
    shape = whole_config.get_text_config()
    length = lengths.widest(config).length
    tokens = config.train.batch_size * tasks.TASKS[config.task.name].rows * length
    heads, layers = shape.num_attention_heads, shape.num_hidden_layers
    one = tokens * (34 * shape.hidden_size + 5 * heads * length) * wide / 2
    inputs = tokens * shape.hidden_size * wide * layers
    activations = inputs + one if config.model.gradient_checkpointing else one * layers
    logits = 0.0 if classes != 0 else 3 * 4.0 * tokens * shape.vocab_size
    spec = adapted.describe(config.model, config.lora.model_copy(update={"rank": rank}), config.task)
    return float(weights + BYTES_A_TRAINED_WEIGHT * _numel(spec) + activations + logits + PROCESS)


def traffic(config: RunConfig) -> str:
    """The bytes that a node sends and receives in a round at most."""
    recipe, nodes = Recipe.build(config), share_of(config.min_nodes, config.fraction_train)
    spec = adapted.describe(config.model, config.lora, config.task, recipe.structure)
    planned = planned_bytes(recipe, spec, nodes)
    up, down = readable.size(planned.up), readable.size(planned.down)
    once = "; model.adapter is sent as well" if config.model.adapter else ""
    return f"at most {up} up, {down} down per node and round ({config.rule}, {config.wire.up}, {nodes} nodes){once}"


def _numel(spec: Spec) -> int:
    shapes: Mapping[Any, tuple[int, ...]] = spec.factor_shapes() | dict(spec.head)
    return sum(math.prod(shape) for shape in shapes.values())
