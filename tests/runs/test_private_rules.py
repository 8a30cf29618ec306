"""Private runs of several rules, in every mode."""

import json

import pytest

from tests.support.grid import run_in_process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "mode"),
    [
        ("flora", "example"),
        ("fedsvd", "update-central"),
        pytest.param("flora", "update-local", marks=pytest.mark.exhaustive),
        *(pytest.param(rule, "example", marks=pytest.mark.exhaustive) for rule in ("fedit", "ffa-lora", "rolora")),
    ],
)
def test_a_private_run_ends_with_an_adapter_that_no_seed_repeats(rule, mode, settings, tmp_path):
    private = {
        "rule.name": rule,
        "privacy.mode": mode,
        "privacy.accountant": "prv" if mode == "update-central" else "rdp",
        "privacy.noise-multiplier": 0.8,
        "privacy.expected-batch": 6,
        "privacy.records": 400,
        "train.weighting": "uniform",
    }
    digests = set()
    for name in ("one", "two"):
        run_in_process(settings(**private, **{"run-name": name}), nodes=2)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["rounds"] == 2
        assert (tmp_path / name / "adapter/adapter_model.safetensors").exists()
        digests.add(summary["adapter_digest"])
    assert len(digests) == 2
