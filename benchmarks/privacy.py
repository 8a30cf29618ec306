"""What a private step costs beside a plain one: time and peak memory, for each engine.

    python -m benchmarks.privacy            (--small for a quick look)

A step is four physical batches forward and backward, and AdamW; a private one also clips and adds noise, once a step.
The engines take turns within a repetition, on the same batch and the same model, and a ratio is the median of the
repetitions' own. The models have random weights: MiniLM's shape (6 layers of 384,
query and value adapted) and four Llama blocks (512, every linear layer adapted), both in NF4. One thread.

Memory is what torch's allocator held at its peak, beyond what it held before the step.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common import tasks
from common.config.run import RunConfig
from common.models import adapted
from common.models.adapted import LoraModel
from common.privacy.gaussian import Gaussian, rounded_normal
from common.tasks import Batch, Example, Task
from strategies import Recipe
from strategies.gradients import GRADIENTS, Engine
from strategies.rules import FedIT

MINILM = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
LLAMA = LlamaConfig(
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
)
BATCHES = 4
SETTINGS = {
    "MiniLM": {"task.name": "classify", "lora.targets": "query,value"},
    "Llama": {"task.name": "text", "lora.targets": "all-linear"},
}


class Case(NamedTuple):
    """One line of the table."""

    model: str
    rank: int
    examples: int
    tokens: int


CASES = [
    Case("MiniLM", 8, 8, 64),
    Case("MiniLM", 8, 16, 128),
    Case("MiniLM", 8, 32, 64),
    Case("MiniLM", 64, 16, 128),
    Case("Llama", 8, 8, 64),
    Case("Llama", 8, 8, 128),
    Case("Llama", 16, 4, 256),
    Case("Llama", 64, 8, 64),
    Case("Llama", 64, 8, 128),
]
ENGINES = [name for name, gradient in GRADIENTS.items() if gradient.engine]
SMALL = [Case("MiniLM", 8, 4, 32), Case("Llama", 8, 4, 32)]


class Bench:
    """One model, one batch, and a step of each kind."""

    def __init__(self, model: LoraModel, task: Task, examples: int, tokens: int) -> None:
        self.task, self.model = task, model
        state = Recipe.around(FedIT()).start(self.model.spec, 0)
        self.model.install(state.adapter, state.scale, {})
        self.model.network.train()
        parameters = self.model.train_only(self.model.keys)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        rows = torch.randint(5, min(1000, model.network.config.vocab_size), (examples, tokens)).tolist()
        labels = [[0]] * examples if self.task.sequence_classification else rows
        self.batch: Batch = self.task.collate([Example(*pair) for pair in zip(rows, labels, strict=True)], 0)

    @classmethod
    def of(cls, case: Case, folder: Path) -> Self:
        """The bench of a line of the table, with the model in ``folder``."""
        name = str(folder / case.model)
        config = RunConfig.from_flower({"model.name": name, "lora.rank": case.rank, **SETTINGS[case.model]})
        model = adapted.load(config.model, config.lora, config.task, "auto")
        return cls(model, tasks.build(config.task), case.examples, case.tokens)

    def plain(self) -> None:
        """An ordinary step."""
        for _ in range(BATCHES):
            self.task.loss(self.model.outputs(self.batch)).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def measured(self, name: str, measure: Callable[[Callable[[], None]], float]) -> float:
        """A step of one engine, or a plain one; attaching the engine is not part of it."""
        if name == "plain":
            return measure(self.plain)
        mechanism = Gaussian(sensitivity=1.0, noise_multiplier=1.0)
        with GRADIENTS[name]().attach(self.model.network, mechanism.bound) as engine:
            batches = [self.batch] * BATCHES
            return measure(lambda: private_step(self.model, self.task, batches, engine, mechanism, self.optimizer))


def private_step(
    model: LoraModel,
    task: Task,
    batches: Sequence[Batch],
    engine: Engine,
    mechanism: Gaussian,
    optimizer: torch.optim.Optimizer,
) -> None:
    """One step over ``batches``, every example clipped, and noise once."""
    for batch in batches:
        output = model.outputs(batch)
        engine.add(task.losses(output), rows=output.rows)
    for parameter, noised in mechanism.release(engine.take()):
        parameter.grad = noised.to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def seconds(step: Callable[[], None]) -> float:
    """How long a step takes: on a CPU the time of this process, whatever else runs there."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


def peak(step: Callable[[], None]) -> float:
    """The most bytes that a step holds, beyond what is there already."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        step()
    events = [event for event in traced.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return float(most)


def tokenizer() -> PreTrainedTokenizerFast:
    """The least that a model is loaded with: the batches are drawn as token ids."""
    names = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<other>"}
    words = WordLevel({word: number for number, word in enumerate(names.values())}, unk_token=names["unk_token"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **names)


def row(case: Case, folder: Path, repeats: int) -> None:
    """Measure one case and print its line."""
    bench = Bench.of(case, folder)
    names = ["plain", *ENGINES]
    for name in names:
        bench.measured(name, seconds)
    times = [{name: bench.measured(name, seconds) for name in names} for _ in range(repeats)]
    memory = {name: bench.measured(name, peak) for name in names}
    plain = statistics.median(time["plain"] for time in times)
    ratios = [f"{statistics.median(time[name] / time['plain'] for time in times):.2f}" for name in ENGINES]
    shares = [f"{memory[name] / memory['plain']:.2f}" for name in ENGINES]
    cells = [case.model, case.rank, f"{case.examples} x {case.tokens}", f"{1e3 * plain:.0f}", *ratios]
    print("| " + " | ".join(map(str, [*cells, f"{memory['plain'] / 1e6:.0f}", *shares])) + " |", flush=True)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two small cases, three repetitions")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--ranks", type=int, nargs="*", help="only the cases of these ranks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engines = " | ".join(ENGINES)
    print(f"| model | r | batch | plain ms | {engines} | plain MB | {engines} |")
    print("|---" * (5 + 2 * len(ENGINES)) + "|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        BertModel(MINILM).save_pretrained(folder / "MiniLM")
        LlamaForCausalLM(LLAMA).save_pretrained(folder / "Llama")
        for name in SETTINGS:
            tokenizer().save_pretrained(folder / name)
        for case in SMALL if arguments.small else CASES:
            if case.rank in (arguments.ranks or [case.rank]):
                row(case, folder, 3 if arguments.small else arguments.repeats)
    count = 1_000_000
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    drawn = statistics.median(seconds(lambda: _draw(count, device)) for _ in range(5))
    print(f"\nnoise: {1e9 * drawn / count:.0f} ns a coordinate")
    return 0


def _draw(count: int, device: torch.device) -> None:
    rounded_normal(count, 2.0**20, device)


if __name__ == "__main__":
    sys.exit(main())
