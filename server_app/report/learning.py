"""The sections that say what was learned: scores and losses, over all and for each node; what merging lost."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from common import readable
from common.record.event import Event
from common.record.events import AggregationError, Data, Evaluate, HeldOut, Merge, Train
from common.record.run import Run, figures
from server_app.report import spending
from server_app.report.chart import chart, spark
from server_app.report.page import NOTHING, Html, element, section, table

WORST_LAYERS = 5
Figures = Mapping[int, float]
E = TypeVar("E", bound=Event)


def title(run: Run) -> Html:
    """The run's name, and in a line what it was."""
    config = run.config
    model = f"{config.get('model.name', 'unknown model')} ({config.get('model.quantization', NOTHING)})"
    facts = [str(config.get("rule.name", "unknown rule")), model, f"rank {config.get('lora.rank', NOTHING)}"]
    facts += [f"{len(run.nodes)} nodes"] if run.nodes else []
    facts += [f"private ({config['privacy.mode']})"] if run.private else []
    state = element("span", run.state, class_="state" if run.state == "finished" else "state warn")
    reason = element("p", run.stopped.reason, class_="reason") if run.stopped else ""
    about = element("p", state, " · ", " · ".join(facts), class_="about")
    return element("header", element("h1", run.name), about, reason)


def headline(run: Run) -> Html:
    """The figures that a reader wants first."""
    tiles = [_tile("Rounds", f"{run.done} of {run.rounds}", f"in {readable.duration(run.seconds)}")]
    if run.scores:
        first, last = _ends({turn: score for turn, score in run.scores.items() if turn <= run.exported} or run.scores)
        best = f", after round {run.exported}, the best" if run.exported < run.done else ""
        tiles.append(_tile(run.metric.capitalize(), last, f"held out{best}; {first} before"))
    if losses := run.losses:
        first, last = _ends(losses)
        tiles.append(_tile("Training loss", last, f"{first} at first" if len(losses) > 1 else "in one round"))
    if run.private:
        bounds = spending.epsilon_bounds(run)
        known = [bound for bound in bounds.values() if bound is not None]
        value = f"≤ {max(known):.3g}" if known and len(known) == len(bounds) else NOTHING
        tiles.append(_tile("Epsilon of a node", value, f"at delta {run.config.get('privacy.delta', NOTHING)}"))
    for way in ("up", "down"):
        trained, published = run.trained(way), run.trained(way, by_formula=True)
        share = f", {trained / published:.0%} of the values" if published else ""
        note = f"{readable.size(trained)} in training{share}"
        tiles.append(_tile(f"Bytes {way}", readable.size(run.tally.crossed[way]), note))
    failed = run.tally.failures.total()
    tiles.append(_tile("Failures", str(failed), "the reasons are below" if failed else "no node failed"))
    return element("dl", *tiles, class_="headline")


def curves(run: Run) -> Html:
    """Loss and score by round, with the range of the nodes."""
    evaluated = {node: _scores(events) for node, events in run.by_node(Evaluate).items()}
    trained = {node: _losses(events) for node, events in run.by_node(Train).items()}
    pictures = [
        element("figure", element("figcaption", name), chart(name, history, own))
        for name, history, own in (
            (f"Held-out {run.metric}", run.held_out, evaluated),
            (f"Central {run.metric}", run.central, {}),
            ("Training loss", run.losses, trained),
        )
        if history
    ]
    if not pictures:
        nothing = "No loss and no score leaves a node of a private run." if run.private else "Nothing is measured yet."
        return section("Loss and score", element("p", nothing))
    note = "By round; 0 is before training. The line is over all nodes, the band from the lowest node to the highest."
    return section("Loss and score", element("p", note), element("div", *pictures, class_="charts"))


def nodes(run: Run) -> Html:
    """A line a node."""
    head = ["node", "by round", "before", "after", "loss", "rounds", "tokens", "training"]
    head += ["up", "down", "peak memory", "epsilon", "failures", "records", "left out", "cut"]
    trained, evaluated = run.by_node(Train), run.by_node(Evaluate)
    bounds, failed = spending.epsilon_bounds(run), run.tally.failures
    read = run.by_node(Data)
    rows = []
    for node in run.nodes:
        own, scores = trained.get(node, {}), _scores(evaluated.get(node, {}))
        row = [node, spark(scores) if scores else NOTHING, *_ends(scores), _ends(_losses(own))[1], str(len(own))]
        row.append(_total(own, lambda event: event.tokens, "{:,.0f}".format))
        row.append(_total(own, lambda event: event.seconds, readable.duration))
        row.append(_total(own, lambda event: event.bytes_up, readable.size))
        row.append(_total(own, lambda event: event.bytes_down, readable.size))
        row.append(_total(own, lambda event: event.peak_memory, readable.size, max))
        row.append(spending.told(bounds, node) if bounds else NOTHING)
        rows.append([*row, str(failed[node]), *_data(read.get(node, {}))])
    if not rows:
        return section("Nodes", element("p", "No node has been asked yet."))
    return section("Nodes", element("p", _about_nodes(run)), table(*_telling(head, rows)))


def classes(run: Run) -> Html:
    """A line a class, where the task has classes and what each came to is told."""
    told = {turn: event.classes or {} for turn, event in run.by_round(HeldOut).items()}
    turn = run.exported if run.exported in told else max(told, default=0)
    if not (last := told.get(turn, {})):
        return Html("")
    head = ["class", "share of the examples", "right before", "right after"]
    rows = []
    for name, facts in last.items():
        before = told.get(0, {}).get(name, {})
        shares = (facts.get("share"), before.get("recall"), facts.get("recall"))
        rows.append([name, *(NOTHING if share is None else f"{share:.1%}" for share in shares)])
    about = element("p", f"On the held-out examples of all nodes, after round {turn}.")
    return section("Classes", about, table(head, rows))


def rounds(run: Run) -> Html:
    """A line a round."""
    merges, error = run.by_round(Merge), run.lost
    if not merges:
        return Html("")
    head = ["round", "nodes", "loss", run.metric or "score", "up", "down", "time", "aggregation error"]
    rows = []
    for turn, event in sorted(merges.items()):
        measured = (event.loss, run.scores.get(turn))
        row = [str(turn), f"{event.nodes} of {event.asked}"]
        row += [NOTHING if value is None else readable.figure(value) for value in measured]
        row += [readable.size(event.bytes_up), readable.size(event.bytes_down), readable.duration(event.seconds)]
        rows.append([*row, f"{100 * error[turn]:.2g}%" if turn in error else NOTHING])
    return section("Rounds", table(*_telling(head, rows)))


def lost(run: Run) -> Html:
    """The aggregation error, or why there is none."""
    errors = run.lost
    if not errors:
        return section("Aggregation error", element("p", _why_no_error(run)))
    about = (
        "How far the merged model was from the weighted mean of the nodes' models, as a share of that mean update. "
        "An exact rule loses nothing."
    )
    layers = run.by_round(AggregationError)[max(errors)].layers
    worst = sorted(layers.items(), key=lambda layer: -layer[1])[:WORST_LAYERS]
    percent = {turn: 100 * error for turn, error in errors.items()}
    picture = element("figure", element("figcaption", "All layers, %"), chart("Aggregation error, %", percent))
    head = ["layers that lost most, last round", "error"]
    listed = table(head, [[name, f"{100 * error:.2g}%"] for name, error in worst])
    return section("Aggregation error", element("p", about), element("div", picture, listed, class_="charts"))


def _why_no_error(run: Run) -> str:
    if run.rule.personal:
        return "None: every node keeps a model of its own, and there is no merged one to measure."
    if run.rule.exact:
        return "None: the rule is exact, so the merged model is the weighted mean of the nodes' models."
    return "Not measured: only the private mean is known." if run.private else "Not measured yet."


def _data(events: Mapping[int, Data]) -> tuple[str, str, str]:
    """How many records a node has, how many are left out and why, and how many are cut."""
    if 0 not in events:  # a private run, or an older one
        return NOTHING, NOTHING, NOTHING
    counts = events[0].counts
    out = sum(counts.left_out.values())
    why = f" ({counts.reasons})" if out else ""
    cut = f"{counts.cut:,} at {counts.length:,} tokens" if counts.cut else "0"
    return f"{counts.records:,}", f"{out:,}{why}", cut


def _about_nodes(run: Run) -> str:
    if run.private:
        return (
            "No loss, score, count or time leaves a node of a private run. Epsilon is an upper bound for this run; the "
            "node's ledger has the exact figure, over all runs."
        )
    return "Sums over the rounds. Training is the time in the local loop; peak memory is of the node's process or GPU."


def _tile(label: str, value: str, note: str) -> Html:
    return element("div", element("dt", label), element("dd", value, element("small", note)))


def _scores(events: Mapping[int, Evaluate]) -> Figures:
    return figures(events, lambda event: event.score)


def _losses(events: Mapping[int, Train]) -> Figures:
    return figures(events, lambda event: event.loss)


def _ends(history: Figures) -> tuple[str, str]:
    """The first figure, where there are two, and the last."""
    if not history:
        return NOTHING, NOTHING
    first, last = (readable.figure(history[turn]) for turn in (min(history), max(history)))
    return (first if len(history) > 1 else NOTHING), last


def _total(
    events: Mapping[int, E],
    figure: Callable[[E], float | None],
    write: Callable[[float], str],
    of: Callable[..., float] = sum,
) -> str:
    values = figures(events, figure).values()
    return write(of(values)) if values else NOTHING


def _telling(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns in which something stands."""
    kept = [index for index in range(len(head)) if any(row[index] != NOTHING for row in rows)]
    return [head[index] for index in kept], [[row[index] for index in kept] for row in rows]
