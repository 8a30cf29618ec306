"""Embeddings beside dense formulas and scikit-learn's figures, and what an example's loss may look at."""

import random

import numpy as np
import pytest
import torch
from sklearn.metrics import label_ranking_average_precision_score, top_k_accuracy_score
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from client_app.clipping import Clip
from client_app.training import Turn, train
from common import tasks
from common.config.run import ModelConfig, TaskConfig, TrainConfig
from common.models import adapted, base
from common.privacy.accounting import Release
from common.tasks import Example, Output, Score
from common.tasks.embed import ANCHOR, NEGATIVE, POSITIVE, UNIT
from tests.support.architectures import save
from tests.support.private_steps import PRIVATE, brute_force, gradients, relative, scattered, train_here
from tests.support.training import recipe_of

WIDTH = 6


def task(**settings):
    return tasks.build(TaskConfig.model_validate({"name": "embed", "max-length": 24, **settings}))


def drawn(count, negatives, seed=0, width=WIDTH):
    """Vectors of anchors, positives and negatives near them, with their labels, no two of one text."""
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randn(count, width, generator=generator)
    positives = anchors + torch.randn(count, width, generator=generator)
    hard = anchors[:negatives] + torch.randn(negatives, width, generator=generator)
    kinds = [ANCHOR] * count + [POSITIVE] * count + [NEGATIVE] * negatives
    labels = torch.tensor([[kind, 1000 * seed + place] for place, kind in enumerate(kinds)])
    return Output(normalize(torch.cat([anchors, positives, hard]), dim=-1).requires_grad_(), labels)


def rows(output, kind):
    return output.values[output.labels[:, 0] == kind]


@pytest.mark.parametrize("negatives", [0, 3, 5])
def test_in_batch_negatives_are_the_multiple_negatives_ranking_loss(negatives):
    """As sentence-transformers writes it: cross-entropy over cosine similarities to all positives and negatives."""
    output, kind = drawn(5, negatives), task(scale=7.0)
    anchors, positives, hard = (rows(output, each) for each in (ANCHOR, POSITIVE, NEGATIVE))
    similarities = 7.0 * cosine_similarity(anchors[:, None], torch.cat([positives, hard])[None], dim=-1)
    theirs = cross_entropy(similarities, torch.arange(5))
    ours = kind.loss(output)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    mine, yours = (torch.autograd.grad(each, output.values, retain_graph=True)[0] for each in (ours, theirs))
    # Along the sphere: what would change a vector's length is lost in its normalisation.
    tangent = [g - (g * output.values).sum(1, keepdim=True) * output.values for g in (mine, yours)]
    torch.testing.assert_close(*tangent, rtol=1e-4, atol=1e-6)


def test_own_negatives_are_infonce_of_two():
    output, kind = drawn(5, 5), task(negatives="own")
    a, p, n = (rows(output, each).detach().double().numpy() for each in (ANCHOR, POSITIVE, NEGATIVE))
    near, far = np.exp(20 * (a * p).sum(1)), np.exp(20 * (a * n).sum(1))
    assert kind.sums(output).tolist() == pytest.approx((-np.log(near / (near + far))).tolist(), rel=1e-4)
    assert kind.figures(kind.score(output))["accuracy@1"] == pytest.approx(np.mean(near > far))


def test_a_text_that_is_the_anchor_or_its_positive_once_more_is_no_negative():
    """The first two have one positive, and the second negative is the fourth anchor."""
    output, kind = drawn(4, 2), task()
    output.labels[5, 1], output.labels[9, 1] = output.labels[4, 1], output.labels[3, 1]
    a, candidates = rows(output, ANCHOR), torch.cat([rows(output, POSITIVE), rows(output, NEGATIVE)])
    said = (20 * a @ candidates.T).double()
    for number, left_out in enumerate([[1], [0], [], [5]]):
        there = [place for place in range(6) if place not in left_out]
        expected = said[number, there].logsumexp(0) - said[number, number]
        assert kind.sums(output)[number].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    only = Output(output.values[:2], torch.tensor([[ANCHOR, 0], [POSITIVE, 1]]))
    (gradient,) = torch.autograd.grad(kind.loss(only), output.values)
    assert not gradient.any(), "an anchor without any negative teaches nothing, and is no NaN"


@pytest.mark.parametrize("negatives", [0, 9])
def test_what_is_found_is_scikit_learns_over_all_that_is_held_out(negatives, monkeypatch):
    """In whatever batches, and however many anchors at a time."""
    monkeypatch.setattr("common.tasks.embed.CHUNK", 7)
    kind = task()
    parts = [drawn(count, hard, seed) for seed, (count, hard) in enumerate([(11, negatives), (3, 0), (16, negatives)])]
    score = kind.scored(iter(parts))
    anchors, positives, hard = (torch.cat([rows(p, each) for p in parts]) for each in (ANCHOR, POSITIVE, NEGATIVE))
    said = (anchors @ torch.cat([positives, hard]).T).detach().double().numpy()
    true = np.eye(*said.shape)
    found = kind.figures(score)
    assert found["accuracy@1"] == pytest.approx(top_k_accuracy_score(range(30), said, k=1, labels=range(said.shape[1])))
    assert found["mrr"] == pytest.approx(label_ranking_average_precision_score(true, said), abs=1e-6)
    assert 0.2 < found["accuracy@1"] < found["mrr"] < 0.95
    expected = cross_entropy(torch.from_numpy(20 * said), torch.arange(30), reduction="sum")
    assert score.loss == pytest.approx(expected.item(), rel=1e-5)
    assert (score.count, kind.adds_up(score)) == (30, True)
    assert kind.scored(iter(())) == Score()


def test_scores_of_nodes_add_up_to_the_share_of_all_their_anchors():
    kind = task()
    nodes = [kind.scored([drawn(count, 0, count)]) for count in (4, 9)]
    both, (few, more) = kind.figures(sum(nodes, Score())), map(kind.figures, nodes)
    for figure in ("accuracy@1", "mrr"):
        assert both[figure] == pytest.approx((4 * few[figure] + 9 * more[figure]) / 13)


def test_neither_a_tie_nor_what_is_no_number_is_found():
    kind, output = task(), drawn(4, 0)
    alike = Output(output.values[:1].detach().expand(8, -1), output.labels)
    assert (kind.score(alike).correct, kind.figures(kind.score(alike))["mrr"]) == (0, 0.25)
    assert kind.score(Output(torch.full((8, WIDTH), torch.nan), output.labels)).correct == 0


@pytest.mark.parametrize(("correct", "ranks"), [(2, 1.9), (2, 3.01), (4, 3.9), (0, 2.1)])
def test_reciprocal_ranks_that_cannot_be_are_refused(correct, ranks):
    kind = task()
    assert not kind.adds_up(Score(1.0, correct, 4, {"ranks": (int(ranks * UNIT),)}))
    assert kind.adds_up(Score(1.0, 2, 4, {"ranks": (int(2.5 * UNIT),)}))


@pytest.fixture(scope="module", params=["llama", "bert"])
def model(request, tmp_path_factory):
    """A decoder and an encoder, whose factors all matter."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if request.param == "bert" else {}
    folder = save(request.param, tmp_path_factory.mktemp("base") / request.param, **still)
    config = ModelConfig.model_validate({"name": str(folder), "quantization": "none"})
    network = base.load(config, None, torch.device("cpu"))
    return scattered(adapted.LoraModel(network, adapted.LoraConfig(rank=4)))


def texts(count):
    """Anchors, positives and negatives of many lengths."""
    generator = torch.Generator().manual_seed(1)

    def text(kind, length, against=None):
        return Example(torch.randint(3, 2000, (length,), generator=generator).tolist(), [kind], against=against)

    lengths = torch.randint(2, 24, (count, 3), generator=generator).tolist()
    return [text(ANCHOR, a, text(POSITIVE, p, text(NEGATIVE, n))) for a, p, n in lengths]


def test_a_loss_of_own_negatives_is_the_same_alone_and_in_a_batch(model):
    chosen, losses = texts(6), {}
    for negatives in ("own", "batch"):
        kind = task(negatives=negatives)
        with torch.no_grad():
            together = kind.losses(model.outputs(kind.collate(chosen, model.pad)))
            alone = torch.cat([kind.losses(model.outputs(kind.collate([each], model.pad))) for each in chosen])
        losses[negatives] = together, alone
    torch.testing.assert_close(*losses["own"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(*losses["batch"], rtol=1e-2), "in-batch negatives are companions"


def test_a_step_weighs_every_anchor_of_its_batches_alike(model):
    """Accumulated batches are averaged over their anchors together, and negatives are those of a batch of its own."""
    kind, chosen, trained = task(), texts(7), model.train_only(model.keys)
    config = {"steps": 1, "batch-size": 4, "accumulation": 2, "clip-norm": 0.0, "learning-rate": 1e-9}
    model.network.eval()
    order = random.Random("s")
    order.getrandbits(63)
    shuffled = order.sample(chosen, 7)
    parts = [kind.sums(model.outputs(kind.collate(part, model.pad))).sum() for part in (shuffled[:4], shuffled[4:])]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(sum(parts) / 7, trained)])
    with gradients() as seen:
        train(model, recipe_of(TrainConfig.model_validate(config)), kind, chosen, Turn(0, model.keys, seed="s"))
    assert relative(seen[0], expected) < 1e-5


def test_a_record_of_three_texts_is_clipped_as_one_example(model):
    kind, examples = task(negatives="own"), texts(5)
    each = brute_force(model, model.train_only(model.keys), examples, kind)
    norms = each.norm(dim=1)
    privacy = PRIVATE.model_copy(update={"clip": float(norms.median()), "expected_batch": 1})
    bound = Clip(privacy, 0.0).mechanism.bound
    expected = (each * (bound / norms).clamp(max=1.0)[:, None]).sum(0)
    with gradients() as seen:
        train_here(model, examples, Release(0.0, 1.0, 1), privacy, task=kind)
    assert relative(seen[0], expected) < 1e-5
