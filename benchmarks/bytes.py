"""What Flower sends a round for each rule and codec, beside what is planned for it and a stock message of the adapter.

    python -m benchmarks.bytes

One node of four after one round, r = 8 on queries and values of Llama-3.2-1B's shape; bytes are those of Flower's
serialised message content. The peer is what Flower's FedAvg sends either way: an ArrayRecord of PEFT's state dict.
"""

import argparse

from flwr.app import ArrayRecord, MessageType, RecordDict

from common import wire
from common.adapter.values import LayerShape
from strategies import RULES, Recipe, Rule
from strategies.cost import round_bytes
from strategies.strategy import LoraStrategy, Recipient
from tests.support.factors import after_a_round, trained
from tests.support.grid import flowers_bytes, pose_as_an_app

LAYERS = {
    f"model.layers.{number}.self_attn.{name}": LayerShape(d_out, 2048)
    for number in range(16)
    for name, d_out in (("q_proj", 2048), ("v_proj", 512))
}
RANK, NODES = 8, 4
CODECS = ("fp32", "bf16", "int8", "nf4")


def stock() -> int:
    """A message of Flower's FedAvg over PEFT's tensors, bytes."""
    state = after_a_round(RULES["fedit"](), LAYERS, RANK, NODES)
    named = {f"base_model.model.{key.layer}.lora_{key.part}.weight": tensor for key, tensor in state.adapter.items()}
    return flowers_bytes(RecordDict({"arrays": ArrayRecord(named)}))


def row(rule: Rule) -> str:
    """One rule: what crosses each way, and how far that is from what the recipe says of it."""
    state = after_a_round(rule, LAYERS, RANK, NODES)
    recipe = Recipe.around(rule)
    (message,) = LoraStrategy(recipe).messages(MessageType.TRAIN, state, [Recipient(1)])
    update = wire.pack_update(trained(rule, state, 5, 1.0), rule.name, state.round, "node-000")
    said, cells = round_bytes(recipe, state, {"node-000": RANK}, ["node-000"]), [rule.name]
    for size, expected in (
        (flowers_bytes(RecordDict({"update": update})), said.up),
        (flowers_bytes(message.content), said.down),
    ):
        cells += [f"{size / 1e6:.3f}", f"{size / expected - 1:+.1%}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print a line a rule, and one a codec."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pose_as_an_app()
    print("| rule | MB up | beyond what is said | MB down | beyond what is said |\n|---|---|---|---|---|")
    peer = f"{stock() / 1e6:.3f}"
    print(f"| stock FedAvg over PEFT | {peer} | - | {peer} | - |")
    for rule in (rule() for rule in RULES.values()):
        if rule.plan(0).sent:
            print(row(rule), flush=True)
    fedit = RULES["fedit"]()
    state = after_a_round(fedit, LAYERS, RANK, NODES)
    print("\n| codec of fedit's update | MB up |\n|---|---|")
    for codec in CODECS:
        update = trained(fedit, state, 5, 1.0)
        record = wire.pack_update(update, fedit.name, state.round, "node-000", codec=codec, received=state.adapter)
        print(f"| {codec} | {flowers_bytes(RecordDict({'update': record})) / 1e6:.3f} |")


if __name__ == "__main__":
    main()
