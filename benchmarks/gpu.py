"""What a training step costs on this GPU: NF4 LoRA of Llama's shapes, plain and private, beside bare PEFT.

    python -m benchmarks.gpu                     1B and 8B
    python -m benchmarks.gpu --size toy          a few layers, on a CPU too

The weights are random, so none is fetched; each layer is drawn and quantised on the GPU by itself, so that the 8B
model is never there in 16 bits. Rank 16 on every linear layer. A step is four physical batches forward and backward,
and AdamW; a private one also clips every example's gradient and adds the exact noise, once. *Bare PEFT* is the same
step over ``peft.get_peft_model`` and the model's own loss, with nothing of ours; *TRL* is a step of its ``SFTTrainer``
over such a model, and *padding-free* the same where flash-attn is installed (``benchmarks/sft.py``). All take turns
within a repetition, on the same tokens; a ratio is the median of the repetitions' own.

*Held* is what one model keeps on the GPU between steps, its adapter and AdamW's moments included; *peak* is what a step
needs beyond that.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable

import bitsandbytes as bnb
import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_flash_attn_2_available

from benchmarks.privacy import BATCHES, Bench, peak, seconds, tokenizer
from benchmarks.sft import SftStep
from common import tasks
from common.config.run import LoraConfig, TaskConfig
from common.models import placement
from common.models.adapted import LoraModel

RANK = 16
KINDS = ("bare PEFT", "TRL", "padding-free", "plain", "private")
SIZES = {
    "toy": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "1B": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}


@torch.no_grad()
def random_llama(config: LlamaConfig, device: torch.device, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random weights, its linear layers in NF4 with double quantisation; equal for equal seeds."""
    torch.manual_seed(seed)
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        network = LlamaForCausalLM(config)
    for name, module in list(network.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            network.set_submodule(name, _random_nf4(module, compute, device))
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                drawn = torch.ones(parameter.shape, dtype=compute, device=device)
                drawn = drawn if drawn.ndim == 1 else drawn.normal_(std=0.02)
                setattr(module, name, nn.Parameter(drawn, requires_grad=False))
    network.tie_weights()
    network.model.rotary_emb = type(network.model.rotary_emb)(config).to(device)
    network.is_loaded_in_4bit = True  # PEFT asks
    return network


def _random_nf4(shape: nn.Linear, compute: torch.dtype, device: torch.device) -> bnb.nn.Linear4bit:
    size = (shape.out_features, shape.in_features)
    layer = bnb.nn.Linear4bit(size[1], size[0], bias=False, compute_dtype=compute, quant_type="nf4", device="meta")
    drawn = torch.empty(size, dtype=compute, device=device).normal_(std=0.02)
    layer.weight = bnb.nn.Params4bit(drawn, compress_statistics=True, quant_type="nf4", module=layer).to(device)
    layer.support_avx512bf16_for_cpu = False  # see common/models/base.py
    return layer


class BarePeft:
    """The step as a script would have it: PEFT's own injection, the model's own loss, AdamW."""

    def __init__(self, network: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> None:
        lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self.network = peft.get_peft_model(network, lora).train()
        device = next(self.network.parameters()).device
        self.batch = {name: tensor.to(device) for name, tensor in batch.items()}
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(self) -> None:
        """Four batches, and the optimizer."""
        for _ in range(BATCHES):
            self.network(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Steps:
    """One size: our model, a bare one and TRL's, each with a base of its own."""

    def __init__(
        self, config: LlamaConfig, device: torch.device, examples: int, tokens: int, checkpointing: bool
    ) -> None:
        before = _allocated()
        network = random_llama(config, device)
        if checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        lora = LoraConfig.model_validate({"rank": RANK, "alpha": float(RANK)})
        self.bench = Bench(LoraModel(network, lora), tasks.build(TaskConfig()), examples, tokens)
        self._weights = _allocated() - before

        def bare() -> BarePeft:
            other = random_llama(config, device)
            if checkpointing:
                other.gradient_checkpointing_enable({"use_reentrant": False})
            return BarePeft(other, self.bench.batch)

        self.bare, batches = bare(), [self.bench.batch] * BATCHES
        self.trl = {"TRL": SftStep(bare().network, tokenizer(), batches)}
        if is_flash_attn_2_available():
            (flash := bare().network).set_attn_implementation("flash_attention_2")
            self.trl["padding-free"] = SftStep(flash, tokenizer(), batches, padding_free=True)
        self.tokens = BATCHES * examples * tokens

    @property
    def kinds(self) -> list[str]:
        """The steps that can be made here: padding-free wants flash-attn."""
        return [kind for kind in KINDS if kind in self.trl or kind != "padding-free"]

    def seconds(self, kind: str) -> float:
        """How long a step of this kind takes."""
        return self._measured(kind, seconds)

    def peak(self, kind: str) -> float:
        """What a step of this kind needs beyond what is held, in bytes."""
        return self._measured(kind, peak)

    def _measured(self, kind: str, measure: Callable[[Callable[[], None]], float]) -> float:
        if kind in self.trl:
            return measure(self.trl[kind])
        if kind == "bare PEFT":
            return measure(self.bare.step)
        return self.bench.measured("plain" if kind == "plain" else "fast", measure)

    def held(self) -> int:
        """What our model keeps on the GPU between steps, in bytes; 0 on a CPU."""
        state = self.bench.optimizer.state.values()
        moments = sum(tensor.nbytes for kept in state for tensor in kept.values() if torch.is_tensor(tensor))
        return self._weights + moments if self._weights else 0


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def measure(size: str, steps: Steps, repeats: int) -> None:
    """Print the lines of one size."""
    kinds = steps.kinds
    for kind in kinds:
        steps.seconds(kind)
    times = [{kind: steps.seconds(kind) for kind in kinds} for _ in range(repeats)]
    peaks = {kind: steps.peak(kind) for kind in kinds}
    for kind in kinds:
        median = statistics.median(time[kind] for time in times)
        ratio = statistics.median(time[kind] / time["plain"] for time in times)
        memory = (f"{steps.held() / 2**30:.2f}", f"{peaks[kind] / 2**30:.2f}")
        cells = (size, kind, f"{1e3 * median:,.0f}", f"{steps.tokens / median:,.0f}", f"{ratio:.2f}", *memory)
        print(f"| {' | '.join(cells)} |", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), action="append", help="default: 1B and 8B; may be repeated")
    parser.add_argument("--examples", type=int, default=4, help="of a physical batch (default 4)")
    parser.add_argument("--tokens", type=int, default=512, help="of an example (default 512)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    options = parser.parse_args(arguments)
    device = placement.find_device("auto")
    sizes = options.size or ["1B", "8B"]
    if device.type != "cuda" and sizes != ["toy"]:
        print("there is no GPU here; --size toy runs on a CPU", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"no GPU, {platform.machine()}"
    shape = f"{BATCHES} batches of {options.examples} x {options.tokens} tokens a step, r = {RANK}"
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; {shape}")
    print("\n| model | step | ms | tokens/s | over plain | held, GiB | peak, GiB |\n|---|---|---|---|---|---|---|")
    if not is_flash_attn_2_available():
        print("padding-free is left out: flash-attn is not installed here, or has no GPU", file=sys.stderr)
    for size in sizes:
        try:
            steps = Steps(SIZES[size], device, options.examples, options.tokens, options.checkpointing)
            measure(size, steps, options.repeats)
        except torch.cuda.OutOfMemoryError:
            print(f"| {size} | does not fit: try --examples 1 or --checkpointing | | | | | |")
        steps = None  # the next size needs the room
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
