"""Models that an operator has on the machine, beside the embedded one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, PretrainedConfig

from common import embedded
from tests.conftest import tiny_bert


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random encoder, whose classification head has a bias."""
    return tiny_bert(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Saves a random model of a config, with the embedded tokenizer, once: ``saved(name, config, auto)``."""
    root = tmp_path_factory.mktemp("models")

    def save(name: str, config: PretrainedConfig, auto: Any = AutoModel) -> str:
        folder: Path = root / name
        if not folder.exists():
            torch.manual_seed(0)
            auto.from_config(config).save_pretrained(folder)
            AutoTokenizer.from_pretrained(embedded.unpack()).save_pretrained(folder)
        return str(folder)

    return save
