"""How the embedded base model was made: pretraining on the prose of a Python installation.

The corpus is what every Python installation carries: the pydoc topics (the language reference) and the docstrings of
the standard library. It is prose about programming; the code itself is left out, so that federated fine-tuning on
code has something to teach. Writes ``config.json``, ``tokenizer.json`` and ``weights.jsonl`` beside this file:

    python -m common.models.embedded.pretrain                 # the committed model, about an hour on two cores
    python -m common.models.embedded.pretrain --steps 20 --out /tmp/tiny
"""

import argparse
import ast
import json
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from common.models.embedded import write_weights

HERE = Path(__file__).parent
VOCABULARY = 2048
SPECIAL = ["<pad>", "<s>", "</s>"]
CONTEXT = 256
BATCH = 24
PEAK_LR = 4e-3
WARMUP = 50


def prose() -> Iterator[str]:
    """Every pydoc topic, then every docstring of the standard library (not its tests), without doctest lines."""
    yield from (topics[name] for name in sorted(topics))
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        if skipped & set(path.relative_to(root).parts):
            continue
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node) or ""
                lines = [line for line in docstring.splitlines() if not line.lstrip().startswith((">>>", "..."))]
                if len(docstring) > 40:
                    yield "\n".join(lines)


def train_tokenizer(corpus: list[str]) -> Tokenizer:
    """A byte-level BPE, so that any text, code included, has an encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def architecture() -> LlamaConfig:
    """A Llama of 1.5 million parameters, its output tied to its embedding."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero; a factor of ``PEAK_LR``."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def pretrain(stream: torch.Tensor, steps: int) -> LlamaForCausalLM:
    """Next-token training on random windows of ``stream`` (1-D token ids)."""
    model = LlamaForCausalLM(architecture())
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    started = time.monotonic()
    for step in range(steps):
        starts = torch.randint(len(stream) - CONTEXT, (BATCH,))
        windows = torch.stack([stream[start : start + CONTEXT] for start in starts.tolist()])
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:5d}/{steps}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)
    return model


def main() -> None:
    """Train tokenizer and model, and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    corpus = list(prose())
    tokenizer = train_tokenizer(corpus)
    bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    encoded = tokenizer.encode_batch(corpus)
    order = torch.randperm(len(encoded)).tolist()
    stream = torch.tensor([token for index in order for token in (bos, *encoded[index].ids, eos)])
    print(f"{sum(map(len, corpus)):,} characters, {len(stream):,} tokens", flush=True)

    model = pretrain(stream, arguments.steps)
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    settings = model.config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (arguments.out / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    write_weights(tensors, arguments.out / "weights.jsonl")


if __name__ == "__main__":
    main()
