"""Does correlated noise pay under DP-SGD? Banded matrix factorisation beside fresh noise, in the settings of a profile.

    python -m benchmarks.mechanisms --task sst2 --data /data --model /models/all-MiniLM-L6-v2

BandMF (Choquette-Choo et al., arXiv:2306.08153): step i samples from part i mod b of the data with probability b q, and
the noise of the steps is ``C^-1 z`` with C lower triangular, b bands, columns of norm 1. The participations of a record
are at least b steps apart, so its columns do not overlap: to it the run is ceil(T / b) Gaussian mechanisms of
sensitivity 1 and sample rate b q, as jax-privacy has it. C minimises ``|A C^-1|_F`` for a workload A; b = 1: DP-SGD.

*Theory*, without training: the squared error of what a workload makes of the noise, over that of fresh noise;
``prefix`` is SGD, ``adam`` the sums of Adam's first moments, fresh in every round. *Spectrum*: the largest singular
value of a clipped, un-noised sum, beside the least that shows in the noise, ``sigma (m n)^(1/4)``; what is below, no
shrinking of singular values can save. *Accuracy*: the head alone on the encoder's frozen states, two nodes, over many
seeds, in milliseconds a run; LoRA adds one to two points to that (docs/comparing.md).
"""

import argparse
import math
import statistics
import sys
import tomllib
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from client_app.units import Wanted, node_units
from common import tasks
from common.config.node import NodeConfig
from common.config.run import RunConfig
from common.config.section import flatten
from common.models import adapted, base
from common.models.pooling import pool
from common.privacy.accounting import noise_multiplier
from common.sources import dealing
from common.tasks import Example
from strategies import Recipe, read_config
from strategies.gradients import Fast
from strategies.gradients.engine import AUTO_S
from strategies.rules import FedIT

EPSILONS = (6.0, 3.0, 1.0)
BANDS = (1, 2, 3, 4, 8, 12)
Features = tuple[Tensor, Tensor]
Plan = tuple[float, int, str, float]  # epsilon, bands, workload, factor of the learning rate
TRAINED = (("prefix", 1), ("prefix", 2), ("prefix", 4), ("adam", 2), ("adam", 3))
RATES = (0.5, 0.7, 1.0, 1.4, 2.0)


def workload(name: str, steps: int, rounds: int) -> Tensor:
    """What turns the gradients of all steps into the parameters after each: T x T, steps of one length."""
    moments = torch.eye(steps * rounds, dtype=torch.float64)
    if name == "adam":
        age = torch.arange(steps, dtype=torch.float64)
        decay = torch.tril(0.9 ** (age[:, None] - age).clamp(min=0))
        moments = torch.block_diag(*[decay / decay.sum(1, keepdim=True)] * rounds)
    return torch.tril(torch.ones_like(moments)) @ moments


@lru_cache
def strategy(name: str, bands: int, steps: int, rounds: int) -> Tensor:
    """The C of least error for a workload, from the square root of the prefix sums cut to its bands."""
    a = workload(name, steps, rounds)
    lag = (torch.arange(len(a))[:, None] - torch.arange(len(a))).clamp(min=-1)
    shape = (lag >= 0) & (lag < bands)
    root = torch.tensor([math.comb(2 * k, k) / 4**k for k in range(len(a))] + [0.0], dtype=a.dtype)
    free = (root[lag] * shape).requires_grad_(True)
    optimizer = torch.optim.LBFGS([free], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        c = free * shape
        error = torch.linalg.solve_triangular(c / c.norm(dim=0), a, upper=False, left=False).square().sum()
        error.backward()  # type: ignore[no-untyped-call]
        return error

    optimizer.step(loss)
    c = free.detach() * shape
    return c / c.norm(dim=0)


def noise(config: RunConfig, epsilon: float, bands: int) -> tuple[float, float]:
    """The noise multiplier of ``bands``, and the sample rate within a part; a rate of 1 is as far as bands go."""
    rate = min(1.0, bands * config.privacy.expected_batch / config.trained_on(config.privacy.records))
    times = math.ceil(config.train.steps * config.num_server_rounds / bands)
    return noise_multiplier(epsilon, config.privacy.delta, rate, times, config.privacy.accountant), rate


def theory(config: RunConfig) -> None:
    """Squared error over that of fresh noise: the mean over all iterates, and of the last."""
    shape = config.train.steps, config.num_server_rounds
    print("| epsilon | bands | noise multiplier | prefix, mean | last | adam, mean | last |\n" + "|---" * 7 + "|")
    for epsilon in EPSILONS:
        fresh = noise(config, epsilon, 1)[0]
        for bands in BANDS:
            sigma, cells = noise(config, epsilon, bands)[0], []
            for name in ("prefix", "adam"):
                a = workload(name, *shape)
                c = strategy(name, bands, *shape)
                error = torch.linalg.solve_triangular(c, a, upper=False, left=False).square() * (sigma / fresh) ** 2
                cells += [float(error.sum() / a.square().sum()), float(error[-1].sum() / a[-1].square().sum())]
            print(f"| {epsilon:g} | {bands} | {sigma:.3f} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")


def head(config: RunConfig, nodes: list[Features], held: Features, seed: int, plan: Plan) -> float:
    """The accuracy of one run of the head alone."""
    epsilon, bands, name, factor = plan
    steps, rounds, batch = config.train.steps, config.num_server_rounds, config.privacy.expected_batch
    generator, c = torch.Generator().manual_seed(seed), strategy(name, bands, steps, rounds)
    state = torch.zeros(config.task.labels, nodes[0][0].shape[1])
    drawn = [torch.linalg.inv(c).float() @ torch.randn(len(c), state.numel(), generator=generator) for _ in nodes]
    parts = [torch.randint(bands, (len(y),), generator=generator) for _, y in nodes]
    for first in range(0, steps * rounds, steps):
        ends = []
        for (x, y), z, part in zip(nodes, drawn, parts, strict=True):
            sigma, rate = noise(config, epsilon, bands)
            weight = state.clone().requires_grad_(True)
            optimizer = torch.optim.AdamW([weight], config.train.head_learning_rate * factor, weight_decay=0)
            for step in range(first, first + steps):
                chosen = (torch.rand(len(y), generator=generator) < rate) & (part == step % bands)
                inputs = x[chosen]
                wrong = torch.softmax(inputs @ weight.detach().T, 1)
                wrong[torch.arange(len(wrong)), y[chosen]] -= 1
                norms = wrong.norm(dim=1) * inputs.norm(dim=1)
                clipped = (wrong / (norms + AUTO_S)[:, None]).T @ inputs
                weight.grad = (clipped + sigma * z[step].view_as(state)) / batch
                optimizer.step()
            ends.append(weight.detach())
        state = torch.stack(ends).mean(0)
    return float(((held[0] @ state.T).argmax(1) == held[1]).float().mean())


@torch.no_grad()
def features(model: adapted.LoraModel, task: tasks.Task, examples: list[Example], pad: int) -> Features:
    """The pooled states of the frozen encoder and a 1 for the bias, and the labels; shortest first."""
    model.network.eval()
    encoder = model.network.base_model.model.encoder
    examples = sorted(examples, key=lambda example: len(example.tokens))
    states = []
    for first in range(0, len(examples), 64):
        batch = task.collate(examples[first : first + 64], pad)
        batch.pop("labels")
        states.append(pool(encoder(**batch).last_hidden_state, batch["attention_mask"]))
    return torch.nn.functional.pad(torch.cat(states), (0, 1), value=1.0), torch.tensor(
        [example.labels[0] for example in examples]
    )


def spectrum(config: RunConfig, model: adapted.LoraModel, task: tasks.Task, examples: list[Example], pad: int) -> None:
    """Print the largest singular value of any B's clipped sum at the start, over what shows in the noise."""
    state = Recipe.around(FedIT()).start(model.spec, config.seed)
    model.install(state.adapter, state.scale, {})
    model.train_only(model.keys)
    with Fast().attach(model.network, 1.0, config.privacy.clipping) as engine:
        for first in range(0, config.privacy.expected_batch, 64):
            engine.add(task.losses(model.outputs(task.collate(examples[first : first + 64], pad))))
        sums = engine.take()
    factors = [sums[model.parameters(key)[0]] for key in state.adapter if key.part == "B"]
    largest = max(float(torch.linalg.matrix_norm(total, 2)) / total.numel() ** 0.25 for total in factors)
    shares = [f"{largest / noise(config, epsilon, 1)[0]:.3f}" for epsilon in EPSILONS]
    print(f"\nThe largest singular value over the least that shows, at epsilon {EPSILONS}: {', '.join(shares)}")


def main() -> int:
    """Print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=("sst2", "qnli"), required=True)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the tasks")
    parser.add_argument("--model", required=True, help="a Transformers folder")
    parser.add_argument("--seeds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.data.resolve() / options.task
    profile = tomllib.loads(Path(f"profiles/private_{options.task}.toml").read_text())["config"]
    fixed = {
        "model.name": options.model,
        "privacy.mode": "example",
        "privacy.expected-batch": 256,
        "data.source": str(folder / "train.jsonl.gz"),
    }
    config = read_config(dict(flatten(profile)) | fixed)
    task, tokenizer, seeds = tasks.build(config.task), base.load_tokenizer(config.model), range(options.seeds)
    pad, owned = int(tokenizer.pad_token_id), []
    for index in range(2):
        node = NodeConfig.from_flower({"partition-id": index, "num-partitions": 2})
        wanted = Wanted(config.data, config.task, config.model, config.privacy, 0)
        owned.append([example for (example,) in node_units(wanted, node, config.privacy.records).train])
    theory(config)
    model = adapted.load(config.model, config.lora, config.task, "cpu")
    spectrum(config, model, task, owned[0], pad)
    scored = dealing.read(str(folder / "validation.jsonl.gz"))
    held = features(model, task, [example for (example,) in tasks.encoded(task, scored, tokenizer)[0]], pad)
    nodes = [features(model, task, examples, pad) for examples in owned]
    print("\n| epsilon | C for | bands | rate x " + " | ".join(map(str, RATES)) + " |")
    print("|---" * (3 + len(RATES)) + "|")
    for epsilon in EPSILONS:
        for name, bands in TRAINED:
            cells = []
            for rate in RATES:
                runs = [head(config, nodes, held, seed, (epsilon, bands, name, rate)) for seed in seeds]
                cells.append(f"{statistics.mean(runs):.3f} ± {statistics.stdev(runs):.3f}")
            print(f"| {epsilon:g} | {name} | {bands} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
