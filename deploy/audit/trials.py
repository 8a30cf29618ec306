"""Guessing, from what a node sent, which canaries were in its data.

The guesser is the coordinator: it knows the canaries, the state that it sent and the update that came back. What a
canary adds to a sum of gradients is its own gradient, so it looks for that in the change.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from client_app.training import turn_of
from common.adapter.algebra import chosen_blocks
from common.adapter.values import Key
from common.error import BouquetError
from deploy.audit import bounds
from deploy.audit.canaries import Canary, Record
from deploy.audit.finding import Finding
from deploy.audit.node import Bench, Node, Turn

Say = Callable[[str], None]

SHARES = (0.1, 0.25, 0.5, 1.0)
"""Of all canaries, how many are guessed. Each share is tried, and the doubt is divided among them."""

DAMPING = 0.1
"""Of the least squares, in canaries: what keeps apart two whose gradients are almost one. Noise asks for more, but an
audit is for noise that is not there."""


def one_run(
    bench: Bench, own: Sequence[Record], canaries: Sequence[Canary], runs: int, confidence: float, say: Say
) -> Finding:
    """Each canary is in by a fair coin of its own, and all are guessed from one run (arXiv:2305.08846); or a few.

    The bounds, of all canaries and of each kind, hold together with ``confidence``.
    """
    scores: list[float] = []
    coins: list[bool] = []
    claim = 0.0
    for number in range(1, runs + 1):
        drawn = [bool(secrets.randbits(1)) for _ in canaries]
        chosen = [record for canary, inside in zip(canaries, drawn, strict=True) if inside for record in canary.records]
        node = bench.node([*own, *chosen])
        scores += _scores(node, canaries).tolist()
        coins += drawn
        claim = node.spent()
        say(f"run {number} of {runs}: {sum(drawn)} of {len(canaries)} canaries are in")
    kinds = list(dict.fromkeys(canary.kind for canary in canaries))
    doubt = (1 - confidence) / (len(SHARES) * (1 + len(kinds)))
    delta, whose = bench.config.privacy.delta, [canary.kind for canary in canaries] * runs
    rows = []
    for name in ("all", *kinds):
        places = [place for place, kind in enumerate(whose) if name in ("all", kind)]
        rows.append((name, *_guessed([scores[p] for p in places], [coins[p] for p in places], delta, doubt)))
    most = max(epsilon for _, epsilon, _ in rows)
    said = "\n".join(f"{'':20}{name:12} epsilon {epsilon:.3f} at least: {facts}" for name, epsilon, facts in rows)
    return Finding("one-run", most <= claim, f"{_against(most, claim, confidence, delta)}\n{said}")


def paired(
    bench: Bench, own: Sequence[Record], canaries: Sequence[Canary], runs: int, confidence: float, say: Say
) -> Finding:
    """``runs`` of the node with its own records and as many with one canary more, the one that is easiest to see."""
    first = bench.node(own)
    turn, _ = next(first.turns(first.initial()))
    gradients = _gradients(first, turn, canaries)
    norms = gradients.norm(dim=1, keepdim=True).clamp_min(1e-30)
    # Clipped as in a step; and Adam hears a large coordinate hardly better than a small one.
    loudness = (gradients / norms * norms.clamp(max=bench.config.privacy.clip)).abs().sum(1)
    worst = canaries[int(loudness.argmax())]
    inside: list[float] = []
    outside: list[float] = []
    for number in range(1, runs + 1):
        for found, lines in ((inside, [*own, *worst.records]), (outside, own)):
            node = bench.node(lines)
            found.append(float(_scores(node, [worst])))
        if number in (1, runs) or number % 10 == 0:
            say(f"pair {number} of {runs}")
    claim, delta = node.spent(), bench.config.privacy.delta
    epsilon = bounds.from_pairs(inside, outside, delta, 1 - confidence)
    said = f"{_against(epsilon, claim, confidence, delta)}, from {runs} pairs of runs, one with a canary ({worst.kind})"
    return Finding("paired", epsilon <= claim, said)


def _guessed(scores: Sequence[float], coins: Sequence[bool], delta: float, doubt: float) -> tuple[float, str]:
    """The best bound over :data:`SHARES`, and what it comes of: the highest are guessed in, the lowest out."""
    order = sorted(range(len(scores)), key=scores.__getitem__)
    found = []
    for share in SHARES:
        half = max(1, round(share * len(order) / 2))
        right = sum(coins[place] for place in order[-half:]) + sum(not coins[place] for place in order[:half])
        epsilon = bounds.from_coins(len(order), 2 * half, right, delta, doubt)
        found.append((epsilon, f"{right} of {2 * half} guesses right, {len(order)} canaries"))
    return max(found, key=lambda each: each[0])


def _scores(node: Node, canaries: Sequence[Canary]) -> Tensor:
    """How much of each canary there is in what a run of the node sent: the higher, the likelier it was in.

    The change is taken for ``-sum_i b_i g_i`` and noise, where b_i says whether canary i was in, and solved for b by
    damped least squares; of one canary that is a dot product with its gradient.
    """
    found = torch.zeros(len(canaries), dtype=torch.float64)
    for turn, _ in node.turns(node.initial()):
        gradients = _gradients(node, turn, canaries)
        units = gradients / gradients.norm(dim=1, keepdim=True).clamp_min(1e-30)
        change = _flat(_change(node, turn))
        gram = (units @ units.T).double() + DAMPING * torch.eye(len(canaries), dtype=torch.float64)
        found -= torch.linalg.solve(gram, (units @ change).double())
    return found


def _gradients(node: Node, turn: Turn, canaries: Sequence[Canary]) -> Tensor:
    """The gradient of every canary in the state that the node got, in the coordinates that it sent: ``n x d``."""
    session = node.session
    model, state = session.exchange.receive(turn.message)
    trained = turn_of(session.recipe, state, model.keys)
    model.train_only(trained.keys, trained.blocks)
    model.network.eval()
    sent, rows = _change(node, turn), []
    for canary in canaries:
        model.network.zero_grad(set_to_none=True)
        losses = session.task.losses(model.outputs(session.task.collate(canary.unit, model.pad)))
        losses.sum().backward()  # type: ignore[no-untyped-call]
        gradients = {
            key: torch.cat([torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters(key)])
            for key in sent
        }
        rows.append(_flat({key: chosen_blocks(key, g, turn.update.slots).cpu() for key, g in gradients.items()}))
    model.network.zero_grad(set_to_none=True)
    return torch.stack(rows)


def _change(node: Node, turn: Turn) -> Mapping[Key, Tensor]:
    """What the node changed of each tensor that is sent as it is trained. Raises :class:`BouquetError` if none is."""
    _, state = node.session.exchange.receive(turn.message)
    sent = {}
    for key, tensor in turn.update.tensors.items():
        start = chosen_blocks(key, state.adapter[key], turn.update.slots) if key in state.adapter else None
        if start is not None and start.shape == tensor.shape:
            sent[key] = tensor if node.recipe.rule.relative else tensor - start
    if not sent:
        raise BouquetError(
            "what is sent is not what is trained, so no canary is searched for in it", got=node.recipe.rule.name
        )
    return sent


def _flat(tensors: Mapping[Key, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().float() for tensor in tensors.values()])


def _against(epsilon: float, claim: float, confidence: float, delta: float) -> str:
    sure = f"{100 * confidence:g} % sure"
    return f"epsilon is at least {epsilon:.3f} ({sure}); {claim:.3f} is claimed, at delta {delta:g}"
