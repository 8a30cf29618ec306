"""Data files and models as operators have them, and processes that may hang."""

import csv
import json
import multiprocessing
import resource
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PretrainedConfig

from common.models import embedded

FORK = multiprocessing.get_context("fork")
MODELS = tempfile.TemporaryDirectory(prefix="models")


def saved(name: str, config: PretrainedConfig, auto: Any = AutoModel) -> str:
    """A folder with a random model of a config, and the embedded tokenizer; made once."""
    folder = Path(MODELS.name) / name
    if not folder.exists():
        torch.manual_seed(0)
        auto.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(embedded.unpack()).save_pretrained(folder)
    return str(folder)


def tiny_llama() -> str:
    """The least model that the attacks need; the embedded one takes five times as long."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return saved("tiny", config, AutoModelForCausalLM)


def apart(work: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What ``work`` returns in a process of its own; ``"hung"`` or ``"crashed"`` where it does not return in time.

    The process may take 3 GiB more than this one has.
    """
    mine, its = FORK.Pipe(duplex=False)

    def child() -> None:
        most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 3 * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        its.send(work())

    process = FORK.Process(target=child)
    process.start()
    its.close()
    try:
        return mine.recv() if mine.poll(seconds) else "hung"
    except EOFError:
        return "crashed"
    finally:
        process.kill()
        process.join()


def written(folder: Path, records: Sequence[Any], form: str = "jsonl", name: str = "data") -> Path:
    """A data file; a record that is a string or bytes is a line of it as it stands."""
    file = folder / f"{name}.{form}"
    if form == "csv":
        columns = list(dict.fromkeys(key for record in records for key in record)) or ["text"]
        with file.open("w", newline="") as opened:
            rows = csv.DictWriter(opened, columns)
            rows.writeheader()
            rows.writerows(records)
    elif form == "json":
        file.write_text(json.dumps(list(records)))
    else:
        lines = (line if isinstance(line, str | bytes) else json.dumps(line) for line in records)
        file.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return file
