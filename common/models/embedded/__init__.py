"""The small base model that ships with Bouquet.

Flower's app bundle carries no ``.safetensors``, so the weights travel as ``weights.jsonl``: a line a tensor with its
name, its shape and its float16 values in base64. :func:`unpack` turns the three files into an ordinary Transformers
folder in the user's cache, once, on whichever machine asks: simulation, deployed node and coordinator find the
embedded model in the same way, and from there on it is loaded like any other local folder.
"""

import base64
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent
FILES = ("config.json", "tokenizer.json", "weights.jsonl")


def write_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write ``tensors`` as float16 in base64, a JSON line each."""
    with path.open("w") as file:
        for name, tensor in tensors.items():
            values = tensor.detach().to(torch.float16).contiguous().numpy()
            line = {"name": name, "shape": list(tensor.shape), "float16": base64.b64encode(values.tobytes()).decode()}
            file.write(json.dumps(line) + "\n")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read what :func:`write_weights` wrote, as float32."""
    tensors = {}
    with path.open() as file:
        for line in map(json.loads, file):
            values = np.frombuffer(base64.b64decode(line["float16"]), dtype="<f2").astype(np.float32)
            tensors[line["name"]] = torch.from_numpy(values).reshape(line["shape"])
    return tensors


def unpack() -> Path:
    """Return a Transformers folder with the embedded model; make it in the user's cache if it is not there.

    The folder is named after the digest of its sources and appears by one rename, so that processes that start
    together cannot see half a model.
    """
    digest = hashlib.sha256(b"".join((FOLDER / name).read_bytes() for name in FILES)).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bouquet"
    folder = cache / f"embedded-{digest[:16]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=cache, prefix=".building-"))
    shutil.copy(FOLDER / "config.json", building)
    shutil.copy(FOLDER / "tokenizer.json", building)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **special}
    (building / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    save_file(read_weights(FOLDER / "weights.jsonl"), building / "model.safetensors", metadata={"format": "pt"})
    try:
        building.rename(folder)
    except OSError:  # another process was first; its folder is the same
        shutil.rmtree(building)
    return folder
