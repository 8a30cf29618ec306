"""The ``bouquet`` command, up to where Flower takes over."""

import pytest

from deploy.command import main


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lora.rnak=4"], "lora.rnak: unknown key. Did you mean 'lora.rank'?"),
        (["lora.rank=0", "rule.name=fedex"], "2 mistakes in the run config:"),
        (["train.steps=many"], "train.steps: expected a valid integer, got 'many'"),
        (["rule.florist.energy=all"], "rule.florist.energy: expected a number, got 'all'"),
        (["lora.rank"], "a setting cannot be read: expected key=value, got lora.rank"),
    ],
)
def test_mistakes_are_told_before_anything_is_started(settings, message, capsys, tmp_path):
    assert main(["run", "--directory", str(tmp_path), *settings]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["run", "rules", "compare"])
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"bouquet {command}" in capsys.readouterr().out.split("Example:")[1]
