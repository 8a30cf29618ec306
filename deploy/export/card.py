"""The model card: what a folder holds, how it was trained, and how it is loaded."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from common import tasks
from common.config.privacy import PrivacyConfig
from common.config.run import ModelConfig
from common.models import base
from common.record.directory import Summary
from common.record.events import Central, Train
from common.record.run import read_events
from deploy.export.source import Source
from strategies import RULES

LOADING = {
    "language": """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{base}")""",
    "seeing": """from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("{base}"), "{folder}")
processor = AutoProcessor.from_pretrained("{base}")""",
    "classes": """from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base = AutoModelForSequenceClassification.from_pretrained("{base}", {labels}, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(base, "{folder}")
tokenizer = AutoTokenizer.from_pretrained("{base}")""",
    "pooled": """from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import linear, normalize
from transformers import AutoModel, AutoTokenizer

encoder = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), "{folder}")
head = load_file("{folder}/head.safetensors")
tokenizer = AutoTokenizer.from_pretrained("{base}")

def classify(texts):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    hidden = encoder(**batch).last_hidden_state * batch["attention_mask"][:, :, None]
    return linear(normalize(hidden.sum(1), dim=-1), head["classifier.weight"], head["classifier.bias"])""",
    "embedding": """from peft import PeftModel
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), "{folder}")
tokenizer = AutoTokenizer.from_pretrained("{base}")""",
    "merged": """from transformers import {auto}, {reader}

model = {auto}.from_pretrained("{folder}", dtype="auto")
{beside} = {reader}.from_pretrained("{folder}")""",
    "merged embedding": """from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{folder}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{folder}")""",
}
EMBED = """

def embed(texts):
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    hidden, mask = model(**batch).last_hidden_state.float(), batch["attention_mask"]
    return normalize({vectors}, dim=-1)"""
LAST, MEAN = "hidden[list(range(len(texts))), mask.sum(1) - 1]", "(hidden * mask[:, :, None]).sum(1)"
"""How a text becomes a vector: by its last token, or by the mean of all."""


@dataclass(frozen=True)
class Export:
    """What was made: of which rank, said in words, and how its check came out; ``merged`` into a whole model or not."""

    source: Source
    rank: int
    made: str
    check: str
    licence: str
    merged: bool = False


def write(export: Export, folder: Path, name: str) -> None:
    """Write ``README.md``: the card of the folder, which will be called ``name``."""
    (folder / "README.md").write_text(_header(export) + _body(export, name))


def _header(export: Export) -> str:
    config = export.source.config
    place = base.location(config.model.name)
    data = ModelCardData(
        # A path of this machine means nothing to the hub.
        base_model=None if Path(place).is_absolute() else place,
        library_name="transformers" if export.merged else "peft",
        license=export.licence or None,
        tags=["lora", "federated-learning", "bouquet"],
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _body(export: Export, name: str) -> str:
    source, config = export.source, export.source.config
    what = "A model" if export.merged else "A LoRA adapter"
    trained = "It is one node's own model" if source.node else "It was"
    about = (
        f"{what} from `{_named(config.model)}`, fine-tuned with Bouquet, federated LoRA on Flower. {trained}"
        f"{', ' if source.node else ' '}trained on several machines, none of which saw another's data."
    )
    facts = "\n".join(f"| {title} | {value} |" for title, value in _facts(export))
    return (
        f"# {name}\n\n{about}\n\n| | |\n|---|---|\n{facts}\n\n"
        f"It has not been scored on anything other than the above.\n\n"
        f"## Loading\n\n```python\n{_loading(export, name)}\n```\n\n"
        f"## Checked\n\nReloaded after writing and compared with the run's own model: {export.check}.\n"
    )


def _facts(export: Export) -> Iterator[tuple[str, str]]:
    source, config = export.source, export.source.config
    private = config.privacy.on
    commit = base.commit(config.model)
    yield "base model", f"`{_named(config.model)}`" + (f", revision {commit}" if commit else "")
    if start := config.model.adapter:
        on_hub = not Path(start).expanduser().is_absolute()
        yield "started from", f"the adapter `{start}`" if on_hub else "an existing adapter"
    yield "base while training", config.model.quantization if config.model.quantization != "none" else "not quantised"
    yield "rank", export.made
    yield "task", config.task.name
    yield from tasks.build(config.task).facts().items()
    yield "aggregation rule", f"`{config.rule}` ({RULES[config.rule].paper})"
    yield "rounds", str(source.state.round)
    sizes = _sizes(source.run) if source.run else {}
    if sizes:
        yield "nodes", str(len(sizes))
    if private:
        yield "training examples", "not disclosed: the run was private"
    elif sizes and all(sizes.values()):
        low, high = min(sizes.values()), max(sizes.values())
        yield "training examples", f"{sum(sizes.values()):,}, from {low:,} to {high:,} per node"
    yield "privacy", _privacy(config.privacy, source.node)
    yield from _scores(source)
    yield "licence", export.licence or "as the base model's"


def _named(model: ModelConfig) -> str:
    """The base as the card calls it: of a folder, which may lie elsewhere, the last name."""
    path = Path(model.name).expanduser()
    return path.name if path.is_absolute() else model.name


def _privacy(privacy: PrivacyConfig, node: str) -> str:
    """What is promised, in words that promise no more."""
    if not privacy.on:
        return "none: updates left the nodes in the clear"
    if node and not privacy.per_example:
        return f"none: under {privacy.mode} noise covers what left the node, and this stayed there"
    unit = "one example" if privacy.per_example else "all data of one node"
    if privacy.noise_multiplier:
        amount = (
            f"noise multiplier {privacy.noise_multiplier:g}, clip {privacy.clip:g}; each node's ledger has its epsilon"
        )
    else:
        amount = f"epsilon at most {privacy.epsilon:g} at delta {privacy.delta:g} for the whole run"
    return f"({privacy.mode}) differential privacy of {unit}: {amount}"


def _scores(source: Source) -> Iterator[tuple[str, str]]:
    """The held-out figures that the run measured, where it measured any."""
    if source.run is None or not (summary := Summary.read(source.run)):
        return
    who = source.node or "all"
    after, before = (summary.after or {}).get(who), (summary.before or {}).get(who)
    if after is not None:
        whose = "the node's" if source.node else "all nodes'"
        earlier = "" if before is None else f", {before:.4g} before training"
        yield f"held-out {summary.metric}", f"{after:.4g} on {whose} held-out examples{earlier}"
    central = [event for event in read_events(source.run)[0] if isinstance(event, Central)]
    if last := [event for event in central if event.round == source.state.round and event.score is not None]:
        yield f"central {last[-1].metric}", f"{last[-1].score:.4g} on the coordinator's own examples"


def _sizes(run: Path) -> dict[str, int]:
    """Training examples of every node whose update was merged; 0 where they were not told."""
    return {event.node: int(event.examples or 0) for event in read_events(run)[0] if isinstance(event, Train)}


def _loading(export: Export, name: str) -> str:
    config = export.source.config
    classes, names = tasks.classes(config.task), config.task.names
    if classes is None:
        network: Any = base.skeleton(config.model, classes)
        lines = LOADING["merged embedding" if export.merged else "embedding"] + EMBED
        return lines.format(folder=name, base=base.location(config.model.name), vectors=LAST if network.last else MEAN)
    sees = tasks.TASKS[config.task.name].sees
    kind = "pooled" if config.model.pooled else "classes" if classes else "seeing" if sees else "language"
    kind = "merged" if export.merged else kind
    return LOADING[kind].format(
        folder=name,
        base=base.location(config.model.name),
        labels=f"id2label={dict(enumerate(names))}" if names else f"num_labels={classes}",
        auto=f"AutoModelFor{'SequenceClassification' if classes else 'ImageTextToText' if sees else 'CausalLM'}",
        reader="AutoProcessor" if sees else "AutoTokenizer",
        beside="processor" if sees else "tokenizer",
    )
