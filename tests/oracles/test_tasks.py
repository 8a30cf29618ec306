"""Tasks beside the libraries that people know them from: TRL's losses, scikit-learn's and scipy's figures."""

from collections import defaultdict
from types import MethodType, SimpleNamespace

import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import f1_score, root_mean_squared_error
from torch.nn.functional import binary_cross_entropy_with_logits
from trl import DPOTrainer, KTOTrainer

from client_app.clipping import Clip
from common import tasks
from common.config.run import TaskConfig
from common.privacy.accounting import Release
from common.tasks import Example, Output, Score
from common.tasks.kto import DESIRABLE, UNDESIRABLE
from common.tasks.task import IGNORED
from tests.support.private_steps import PRIVATE, brute_force, fresh, gradients, relative, train_here

TOKENS, N = 6, 5


def task(name, **settings):
    return tasks.build(TaskConfig.model_validate({"name": name, **settings}))


def drawn(rows, labels=None):
    """The losses of tokens behind a prompt of two, of a model and of its base."""
    generator = torch.Generator().manual_seed(3)
    learned = torch.arange(TOKENS) >= 2
    values, base = (torch.rand(rows, TOKENS, generator=generator) * 4 * learned for _ in range(2))
    labels = torch.where(learned, 7, IGNORED).repeat(rows, 1) if labels is None else labels
    return Output(values.requires_grad_(), labels, reference=lambda: base)


class Told:
    """A model that answers TRL with log-probabilities that are given: of its rows in the order of calls."""

    def __init__(self, *values):
        self._values = [-each[:, 1:] for each in values]

    def __call__(self, **_):
        told = self._values.pop(0)
        nothing = torch.zeros_like(told)
        return SimpleNamespace(log_probs=told, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def trainer(reference, **settings):
    """What a loss of TRL looks at of its trainer."""
    alone = SimpleNamespace(device="cpu", gather=lambda each: each, gather_for_metrics=lambda each: each)
    usual = {"aux_loss_enabled": False, "precompute_ref_logps": False, "_total_train_tokens": 0, "_tp_size": 1}
    dpo = {"ld_alpha": None, "use_weighting": False, "loss_types": ["sigmoid"], "loss_weights": [1.0]}
    kto = {"loss_type": "kto", "calculate_KL": True, "f_divergence_type": "reverse_kl"}
    theirs = SimpleNamespace(**usual, **dpo, **kto, **settings, accelerator=alone, ref_model=reference)
    theirs.model = torch.nn.Module()
    theirs.model.is_gradient_checkpointing = False
    theirs.args = SimpleNamespace(gradient_checkpointing_kwargs=None)
    theirs._metrics = {"train": defaultdict(list)}
    theirs._compute_kl_logps = MethodType(KTOTrainer._compute_kl_logps, theirs)
    return theirs


def rows(labels):
    return {
        "input_ids": torch.full(labels.shape, 7),
        "attention_mask": torch.ones_like(labels),
        "completion_mask": (labels != IGNORED).long(),
    }


def test_dpo_is_trls():
    kind, output = task("dpo", beta=0.3), drawn(2 * N)
    theirs = trainer(Told(output.reference()), beta=0.3)
    loss = DPOTrainer._compute_loss(theirs, Told(output.values), rows(output.labels), False)
    ours = kind.loss(output)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-6)
    mine, yours = (torch.autograd.grad(each, output.values)[0] for each in (ours, loss))
    torch.testing.assert_close(mine[:, 1:], yours[:, 1:])
    figures = kind.figures(kind.score(output))
    told = theirs._metrics["train"]
    assert figures["reward-accuracy"] == pytest.approx(told["rewards/accuracies"][-1])
    assert figures["reward-margin"] == pytest.approx(told["rewards/margins"][-1], abs=1e-6)
    assert 0 < figures["reward-accuracy"] < 1


@pytest.mark.parametrize("moved", [1.0, -1.0], ids=["away from the base", "towards it"])
def test_kto_is_trls(moved):
    settings = {"beta": 0.3, "desirable-weight": 1.5, "undesirable-weight": 0.5}
    kind, output = task("kto", **settings), drawn(2 * N)
    shift = torch.where(torch.arange(TOKENS) >= 2, moved, 0.0)
    base = output.reference() + shift
    sides = torch.tensor([True, False, True, True, False])
    output.labels[:N, 0] = torch.where(sides, DESIRABLE, UNDESIRABLE)
    output = output._replace(reference=lambda: base)
    # They compute the mismatched rows apart, and first.
    own, mismatched = rows(output.labels[:N]), rows(output.labels[N:])
    own["completion_mask"][:, 0] = 0
    theirs = trainer(Told(base[N:], base[:N]), beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    batch = {**own, **{f"KL_{name}": each for name, each in mismatched.items()}, "label": sides}
    model = Told(output.values[N:], output.values[:N])
    loss = KTOTrainer._compute_loss(theirs, model, batch, False)
    ours = kind.loss(output)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-6)
    assert (theirs._metrics["train"]["kl"][-1] > 0) == (moved > 0)
    mine, yours = (torch.autograd.grad(each, output.values)[0] for each in (ours, loss))
    torch.testing.assert_close(mine[:, 1:], yours[:, 1:])
    figures = kind.figures(kind.score(output))
    assert figures["reward-margin"] == pytest.approx(theirs._metrics["train"]["rewards/margins"][-1], abs=1e-6)


def test_kto_compares_with_the_reply_to_the_prompt_before():
    """As TRL: (x_1, y_n), (x_2, y_1), and so on."""
    kind = task("kto", **{"max-length": 7})
    examples = [
        Example([1, 2, 10 + n, *range(20 + n, 21 + 2 * n)], [DESIRABLE, *[IGNORED] * 2, *range(20 + n, 21 + 2 * n)])
        for n in range(3)
    ]
    batch = kind.collate(examples, 0)
    assert batch["input_ids"][3:].tolist() == [[1, 2, 10, 22, 23, 24], [1, 2, 11, 20, 0, 0], [1, 2, 12, 21, 22, 0]]
    assert batch["labels"][3:, 3:].tolist() == [[22, 23, 24], [20, *[IGNORED] * 2], [21, 22, IGNORED]]
    assert batch["attention_mask"].sum(1).tolist() == [4, 5, 6, 6, 4, 5]


def test_f1_over_several_labels_is_scikit_learns():
    kind, generator = task("multi-label", labels=4), torch.Generator().manual_seed(0)
    values, labels = torch.randn(50, 4, generator=generator), torch.rand(50, 4, generator=generator) < 0.4
    labels[:, 3], values[:, 3] = False, -1.0
    parts = [kind.score(Output(values[part], labels[part].float())) for part in (slice(20), slice(20, 50))]
    score = sum(parts, Score())
    found = kind.figures(score)
    said, true = (values > 0).numpy(), labels.numpy()
    # The class that nobody says and nobody has does not count.
    assert found["micro-f1"] == pytest.approx(f1_score(true, said, average="micro"))
    assert found["macro-f1"] == pytest.approx(f1_score(true[:, :3], said[:, :3], average="macro"))
    assert score.loss / score.count == pytest.approx(binary_cross_entropy_with_logits(values, labels.float()).item())
    assert score.correct == int((true == said).all(1).sum())
    weighed = task("multi-label", labels=4, **{"class-weights": "1,2,3,4"})
    ideal = binary_cross_entropy_with_logits(values, labels.float(), pos_weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert weighed.loss(Output(values, labels.float())).item() == pytest.approx(ideal.item(), rel=1e-6)


def test_regression_is_scored_as_scikit_learn_and_scipy_do():
    kind, generator = task("regress", range="-1,4"), torch.Generator().manual_seed(0)
    true = torch.rand(60, generator=generator)
    values = (true + 0.3 * torch.randn(60, generator=generator))[:, None]
    parts = [kind.score(Output(values[part], true[part])) for part in (slice(20), slice(20, 60))]
    found = kind.figures(sum(parts, Score()))
    # What is beyond the range counts as its end.
    assert not ((values > 0) & (values < 1)).all()
    mine, theirs = ((5 * each - 1).double().numpy() for each in (values[:, 0].clamp(0, 1), true))
    assert found["rmse"] == pytest.approx(root_mean_squared_error(theirs, mine), rel=1e-6)
    assert found["pearson-r"] == pytest.approx(pearsonr(theirs, mine).statistic, rel=1e-6)
    assert kind.sums(Output(values, true)).tolist() == pytest.approx((values[:, 0] - true).square().tolist())
    alike = kind.score(Output(torch.full((4, 1), 0.3), true[:4]))
    assert list(kind.figures(alike)) == ["rmse"]


def test_a_pair_is_clipped_as_one_example():
    kind, model = task("dpo"), fresh("none")
    examples = [kind.made_up(list(range(10 + 7 * n, 16 + 8 * n)), n) for n in range(5)]
    each = brute_force(model, model.train_only(model.keys), examples, kind)
    norms = each.norm(dim=1)
    privacy = PRIVATE.model_copy(update={"clip": float(norms.median()), "expected_batch": 1})
    bound = Clip(privacy, 0.0).mechanism.bound
    expected = (each * (bound / norms).clamp(max=1.0)[:, None]).sum(0)
    with gradients() as seen:
        train_here(model, examples, Release(0.0, 1.0, 1), privacy, task=kind)
    assert relative(seen[0], expected) < 1e-5
