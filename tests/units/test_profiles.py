"""The profiles of `bouquet compare`: what comes along, and what is refused."""

import json
import re

import pytest

from common.config.section import ConfigError
from common.error import BouquetError
from deploy.command import main
from deploy.compare.cells import cells
from deploy.compare.profile import FOLDER, find, read
from strategies import read_config

DATA = {"data.source": "/data/train.jsonl", "evaluation.source": "/data/validation.jsonl"}


FOLDERS = {"dolly": "dolly3k", "private_qnli": "qnli"} | dict.fromkeys(
    ("private_sst2", "private_clip", "private_rates"), "sst2"
)


TASKS = ["ag_news", "banking77", "clinc150", "commonsense", "gsm8k", "mnli", "qnli", "sst2", *FOLDERS]


@pytest.mark.parametrize("name", [*TASKS, "stdlib"])
def test_the_profiles_that_come_along_are_right(name):
    profile = read(find(name), DATA)
    everything = cells(profile, DATA, quick=False)
    # Nothing that is private is measured against baselines, which are not.
    baselines = {"local", "centralised"} if {cell.epsilon for cell in everything} & {None} else set()
    assert baselines | {*profile.rules} == {cell.method for cell in everything}
    for cell in [*everything, *cells(profile, DATA, quick=True)]:
        read_config(cell.config)


@pytest.mark.parametrize("name", TASKS)
def test_their_fields_are_those_of_the_data(name, shared):
    """A record of the real data has what the task reads, the field to deal by, and no class too many."""
    import gzip

    from common import tasks

    folder = shared / "data" / FOLDERS.get(name, name)
    with gzip.open(folder / "train.jsonl.gz", "rt") as lines:
        records = [json.loads(line) for line in lines]
    profile = read(find(name), DATA)
    config = read_config(profile.base(DATA))
    tasks.build(config.task).check(list(records[0]), where=str(folder))
    partitions = {cell.config["data.partition"] for cell in cells(profile, DATA, quick=False)}
    if partitions != {"iid"}:
        assert config.data.partition_field in records[0]
    if config.task.name == "classify":
        assert {record[config.task.label] for record in records} == set(range(config.task.labels))
    if "natural" in partitions:
        assert len({record[config.data.partition_field] for record in records}) == profile.nodes


def test_every_mistake_is_told_at_once(tmp_path):
    file = tmp_path / "wrong.toml"
    file.write_text(
        "seeds = [0, 0]\n[config]\ntrain.step = 3\nseed = 1\n[rules]\nfedit = { lora.rnak = 2 }\nfeditt = {}\n"
        '[partitions]\niid = { data.partition = "idd" }\n'
    )
    with pytest.raises(ConfigError) as error:
        read(file, {})
    told = str(error.value)
    assert f"7 mistakes in the profile {file}:" in told
    for part in (
        "seeds: expected each value once, got [0, 0]",
        "config: seed cannot be set here:",
        "config: data.source is missing. Set it, or name the data with --data",
        "config: train.step: unknown key. Did you mean 'train.steps'?",
        "rules.fedit: lora.rnak: unknown key. Did you mean 'lora.rank'?",
        "Did you mean 'fedit'?",
        "partitions.iid: data.partition: expected 'natural', 'iid', 'dirichlet' or 'none', got 'idd'",
    ):
        assert part in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rule = 1", "rule: unknown key. Did you mean 'rules'?"),
        ("nodes = 1\n[rules]\nfedit = {}", "nodes: expected greater than or equal to 2, got 1"),
        ('quality = "central"\n[rules]\nfedsa-lora = {}', "fedsa-lora cannot be scored centrally"),
        ("", "rules: expected at least one, such as [rules] fedit = {}"),
        ("seeds = [", "a profile cannot be read"),
        ("[baselines]\nalone = {}", "expected 'local' or 'centralised'"),
    ],
)
def test_a_profile_that_is_not_one_is_refused(text, message, tmp_path):
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(BouquetError, match=re.escape(message)):
        read(file, DATA)


def test_an_unknown_profile_is_answered_with_the_known(capsys):
    assert main(["compare", "sst3"]) == 2
    assert f"there is no profile with this name ({FOLDER}): expected one of ag_news, " in (
        told := capsys.readouterr().err
    )
    assert "Did you mean 'sst2'?" in told
    assert main(["compare", "nowhere/mine.toml"]) == 2
    assert "there is no such profile: got nowhere/mine.toml" in capsys.readouterr().err
