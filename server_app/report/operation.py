"""The sections that say how it was run: failures, bytes, seconds, memory, and everything that was set."""

from collections.abc import Iterator, Mapping

from common import readable
from common.config.run import RunConfig
from common.readable import printable
from common.record.event import Event, OfNode
from common.record.events import (
    Against,
    Camps,
    Central,
    Dropped,
    Evaluation,
    Failure,
    Late,
    Merge,
    Opened,
    SitOut,
    Stalled,
    Start,
    Train,
    Void,
)
from common.record.run import Run
from server_app.report.page import NOTHING, Html, element, section, table

MOST_REASONS = 100
PHASES = {
    "start": "nodes gather, first state",
    "training": "nodes score and train, updates travel",
    "merging": "merging",
    "measuring": "measuring the aggregation error",
    "saving": "checkpoints",
    "evaluation": "nodes score alone",
    "central": "scoring centrally",
}


def failures(run: Run) -> Html:
    """Who could not do its part, and why; the same reason once. What nodes wrote is shown as text and nothing else."""
    grouped: dict[tuple[str, str, str], list[int]] = {}
    for event in run.all(Failure):
        told = (printable(text).strip() or NOTHING for text in (event.node, event.during, event.reason))
        node, during, reason = told
        grouped.setdefault((node, during, reason), []).append(event.round)
    rows = [
        [node, f"{during}, round {_turns(turns)}" if any(turns) else during, _reason(reason)]
        for (node, during, reason), turns in list(grouped.items())[:MOST_REASONS]
    ]
    rows += _incidents(run)
    if not rows:
        return Html("")
    more = len(grouped) - MOST_REASONS
    note = element("p", f"{more} more kinds of failure are in metrics.jsonl.") if more > 0 else ""
    return section("Failures", table(["node", "when", "why"], rows, "words"), note)


def size(run: Run) -> Html:
    """Bytes up and down, beside what the codec makes of the values that the rule sends."""
    rows = []
    for way in ("up", "down"):
        measured, published = run.trained(way), run.trained(way, by_formula=True)
        row = [f"{way}, training", readable.size(measured), readable.size(published) if published else NOTHING]
        row += [f"{measured / published:.1%}" if published else NOTHING, str(run.config.get(f"wire.{way}", NOTHING))]
        rows.append(row)
        # Rounds that did not count, and those that were run again after a restart, are what is left.
        scored = sum(event.crossed.get(way, 0) for event in run.all(Evaluation))
        beside = {"scoring": scored, "rounds that did not count": run.tally.crossed[way] - measured - scored}
        rows += [[f"{way}, {what}", readable.size(size), *[NOTHING] * 3] for what, size in beside.items() if size]
        rows.append([f"{way}, all", readable.size(run.tally.crossed[way]), *[NOTHING] * 3])
    head = ["", "crossed", "the values alone", "share", "codec"]
    note = "Besides its values a message has a header, which matters in a small one."
    return section("Bytes", table(head, rows), element("p", note))


def time(run: Run) -> Html:
    """Seconds by phase, and the most memory."""
    seconds = _phases(run)
    whole = sum(seconds.values())
    rows = [
        [PHASES.get(phase, phase), readable.duration(spent), _percent(spent / whole), _bar(spent / whole)]
        for phase, spent in seconds.items()
    ]
    trained = (event for events in run.by_node(Train).values() for event in events.values())
    peaks = [event.peak_memory for event in trained if event.peak_memory]
    memory = [["a node, at most", readable.size(max(peaks))]] if peaks else []
    if coordinator := run.history(Merge, lambda event: event.peak_memory):
        memory.append(["the coordinator", readable.size(max(coordinator.values()))])
    parts = [table(["phase", "time", "share", ""], rows, "shares")] if rows else []
    parts += [table(["process", "peak memory"], memory)] if memory else []
    return section("Time and memory", *parts) if parts else Html("")


def setting(run: Run) -> Html:
    """Config, versions, rule and seed."""
    config = run.config

    def chosen(key: str) -> str:
        return str(config.get(key, NOTHING))

    rate = config.get("train.learning-rate")
    own = rate is not None and rate == run.rule.learning_rate
    facts = {
        "rule": f"{chosen('rule.name')} ({run.rule.paper or NOTHING})",
        "learning rate": chosen("train.learning-rate") + (", the rule's own" if own else ""),
        "seed": chosen("seed") + ("; privacy noise has none" if run.private else ""),
        "task": f"{chosen('task.name')}, on {chosen('data.source')}",
        "started": ", resumed ".join(event.time for event in run.all(Opened)) or NOTHING,
        "versions": ", ".join(f"{package} {version}" for package, version in run.settings.versions.items()) or NOTHING,
        "code": run.settings.code or NOTHING,
    }
    if run.private:
        keys = ("mode", "epsilon", "delta", "noise-multiplier", "clip", "accountant")
        facts["privacy"] = ", ".join(f"{key} {chosen(f'privacy.{key}')}" for key in keys)
    if run.summary and run.summary.adapter_digest:
        facts["adapter's digest"] = run.summary.adapter_digest
    if run.torn:
        facts["unreadable lines"] = f"{run.torn} of metrics.jsonl, skipped"
    defaults = RunConfig().to_flower()
    if own:
        defaults["train.learning-rate"] = rate
    changed = {key: value for key, value in config.items() if key in defaults and value != defaults[key]}
    return section(
        "What ran",
        table(["", ""], [[name, text] for name, text in facts.items()], "words facts"),
        element("h3", "Set for this run"),
        _settings(changed),
        element("details", element("summary", f"The whole config, {len(config)} keys"), _settings(config)),
    )


def _settings(config: Mapping[str, object]) -> Html:
    if not config:
        return element("p", "Nothing: every key has its default.")
    rows = [[element("code", key), element("code", str(value))] for key, value in config.items()]
    return table(["key", "value"], rows, "words facts")


def _incidents(run: Run) -> Iterator[list[str]]:
    """What went wrong, or nearly, beside failures."""
    for event in run.events:
        if what := _incident(event):
            node = event.node if isinstance(event, OfNode) else "all"
            yield [printable(node), f"round {event.round}", what]


def _incident(event: Event) -> str:
    match event:
        case Void():
            return f"The round did not count: {event.replies} replied, {event.needed} were needed."
        case Dropped():
            return "The round was not merged: the scores that arrived with it ended the run at the round before."
        case SitOut():
            return f"Left out for {event.rounds} rounds after {event.failures} failures in a row."
        case Late():
            return f"Replied to {event.during} after its deadline; not used."
        case Stalled():
            return event.said
        case Against():
            return f"Went against the other nodes (cosine {event.cosine:.2f}); still merged."
        case Camps():
            return f"Two camps: {event.smaller} of {event.nodes} nodes went against the others; none is named."
    return ""


def _reason(text: str) -> Html:
    """A reason; of a long one the first line, and the rest on demand."""
    first, _, rest = text.partition("\n")
    if not rest:
        return element("div", text, class_="reason")
    return element("details", element("summary", first), element("pre", rest), class_="reason")


def _turns(turns: list[int]) -> str:
    listed = sorted(set(turns))
    return ", ".join(map(str, listed)) if len(listed) < 9 else f"{listed[0]} to {listed[-1]} ({len(turns)} times)"


def _phases(run: Run) -> dict[str, float]:
    """The coordinator's seconds by phase, over the rounds that count."""
    total = dict.fromkeys(PHASES, 0.0)
    total["start"] = sum(event.elapsed for event in run.all(Start))
    for event in run.by_round(Merge).values():
        # An older run has the whole round alone.
        spent = event.phases or {"training": event.seconds}
        total |= {phase: total.get(phase, 0.0) + seconds for phase, seconds in spent.items()}
    total["evaluation"] = sum(event.seconds for event in run.by_round(Evaluation).values())
    total["central"] = sum(event.seconds for event in run.by_round(Central).values())
    return {phase: seconds for phase, seconds in total.items() if seconds}


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"


def _bar(share: float) -> Html:
    return element("span", class_="share", style=f"width: {100 * share:.1f}%")
