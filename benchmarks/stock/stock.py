"""The peer of ``benchmarks.round_overhead``: Flower's FedAvg over PEFT adapters, loading the base with every message.

The loop of Flower's FlowerTune template, without its trainer: NF4 base, LoRA r = 8 on all linear layers, AdamW.
"""

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, BitsAndBytesConfig

client = ClientApp()
server = ServerApp()


def load(folder: str) -> PeftModel:
    """The base in NF4 under a fresh adapter."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def batches(context: Context) -> Iterator[BatchEncoding]:
    """The node's share of the texts, tokenised."""
    config, node = context.run_config, context.node_config
    texts = json.loads(Path(str(config["texts"])).read_text())[int(node["partition-id"]) :: int(node["num-partitions"])]
    tokenizer = AutoTokenizer.from_pretrained(str(config["model"]))
    size = int(config["batch-size"])
    for step in range(int(config["steps"])):
        yield tokenizer(
            texts[step * size : (step + 1) * size],
            padding=True,
            truncation=True,
            max_length=128,
            return_tensors="pt",
        )


@client.train()
def train(message: Message, context: Context) -> Message:
    """A few steps from the adapter that came; the adapter, and the seconds that the steps took."""
    torch.set_num_threads(1)
    model = load(str(context.run_config["model"]))
    set_peft_model_state_dict(model, message.content.array_records["arrays"].to_torch_state_dict())
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=5e-3)
    prepared = list(batches(context))
    started = time.monotonic()
    for batch in prepared:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.monotonic() - started
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    metrics = MetricRecord({"num-examples": len(prepared), "seconds": seconds})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """FedAvg; leaves the seconds of every round and of its slowest node's training."""
    config = context.run_config
    ends: list[float] = []

    def ended(_round: int, _arrays: ArrayRecord) -> None:
        ends.append(time.monotonic())

    def slowest(replies: list[RecordDict], _key: str) -> MetricRecord:
        return MetricRecord({"seconds": max(float(reply.metric_records["metrics"]["seconds"]) for reply in replies)})

    start = ArrayRecord(get_peft_model_state_dict(load(str(config["model"]))))
    rounds = int(config["rounds"])
    strategy = FedAvg(fraction_evaluate=0.0, train_metrics_aggr_fn=slowest)
    result = strategy.start(grid, start, num_rounds=rounds, evaluate_fn=ended)
    training = [result.train_metrics_clientapp[number]["seconds"] for number in range(1, rounds + 1)]
    whole = [after - before for before, after in pairwise(ends)]
    Path(str(config["timings"])).write_text(json.dumps({"whole": whole, "training": training}))
