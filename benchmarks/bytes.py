"""What Flower sends a round for each rule and codec, beside the rule's formula and a stock message of the same adapter.

    python -m benchmarks.bytes

One node of four after one round, r = 8 on queries and values of Llama-3.2-1B's shape; bytes are those of Flower's
serialised message content. The peer is what Flower's FedAvg sends either way: an ArrayRecord of PEFT's state dict.
"""

import argparse

from flwr.app import ArrayRecord, MessageType, RecordDict
from flwr.common.serde import recorddict_to_proto

from common import wire
from common.adapter import LayerShape, Spec, State
from strategies import RULES, Rule
from strategies.cost import formula_bytes
from strategies.strategy import LoraStrategy
from tests.factors import trained
from tests.grid import pose_as_an_app

LAYERS = {
    f"model.layers.{number}.self_attn.{name}": LayerShape(d_out, 2048)
    for number in range(16)
    for name, d_out in (("q_proj", 2048), ("v_proj", 512))
}
RANK, NODES = 8, 4
CODECS = ("fp32", "bf16", "int8", "nf4")


def sent(content: RecordDict) -> int:
    """The size of a message's content as Flower serialises it, bytes."""
    return len(recorddict_to_proto(content).SerializeToString())


def after_a_round(rule: Rule) -> State:
    """The state that the second round begins with."""
    state = rule.initial(Spec(LAYERS, {}, RANK, 2.0, rule.blocks), seed=0)
    return rule.aggregate(state, [trained(rule, state, seed, 1.0) for seed in range(NODES)])


def stock() -> int:
    """A message of Flower's FedAvg over PEFT's tensors."""
    state = after_a_round(RULES["fedit"]())
    named = {f"base_model.model.{key.layer}.lora_{key.part}.weight": tensor for key, tensor in state.adapter.items()}
    return sent(RecordDict({"arrays": ArrayRecord(named)}))


def row(name: str) -> str:
    """One rule: what crosses each way, and how far that is from the formula."""
    rule = RULES[name]()
    state = after_a_round(rule)
    (message,) = LoraStrategy(rule).messages(MessageType.TRAIN, state, [1])
    update = wire.pack_update(trained(rule, state, 5, 1.0), name, state.round, "node-000")
    cells = [name]
    for size, formula in (
        (sent(RecordDict({"update": update})), rule.bytes_up),
        (sent(message.content), rule.bytes_down),
    ):
        said = formula_bytes(rule, formula, state, rank=RANK, nodes=NODES, codec="fp32")
        cells += [f"{size / 1e6:.3f}", f"{size / said - 1:+.1%}" if said else "-"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print a line a rule, and one a codec."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pose_as_an_app()
    print("| rule | MB up | beyond its formula | MB down | beyond its formula |\n|---|---|---|---|---|")
    print(f"| stock FedAvg over PEFT | {stock() / 1e6:.3f} | - | {stock() / 1e6:.3f} | - |")
    for name, rule in RULES.items():
        if rule().plan(0).sent:
            print(row(name), flush=True)
    rule = RULES["fedit"]()
    state = after_a_round(rule)
    print("\n| codec of fedit's update | MB up |\n|---|---|")
    for codec in CODECS:
        update = trained(rule, state, 5, 1.0)
        record = wire.pack_update(update, "fedit", state.round, "node-000", codec=codec, received=state.adapter)
        print(f"| {codec} | {sent(RecordDict({'update': record})) / 1e6:.3f} |")


if __name__ == "__main__":
    main()
