"""What a machine is: its versions, a working quantisation, its disk, its clock."""

import shutil
import subprocess
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn

from common.error import BouquetError
from common.models import placement
from deploy.doctor.check import WarningError

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
LEAST_FREE = 2 * 10**9


def versions(constraints: Path = CONSTRAINTS) -> str:
    """The direct dependencies against the versions that were tested; builds of one version (+cu130) are one."""
    lines = constraints.read_text().splitlines() if constraints.exists() else []
    tested = {line.split("==")[0].lower(): line.split("==")[1] for line in lines if "==" in line}
    needed = [Requirement(line).name.lower() for line in requires("bouquet") or [] if "extra ==" not in line]
    wrong = []
    for name in needed:
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "nothing"
        if name in tested and (found == "nothing" or Version(found).public != tested[name]):
            wrong.append(f"{name} {found} (tested: {tested[name]})")
    if wrong:
        raise BouquetError(
            "versions other than those tested", got=", ".join(wrong), cure="pip install -c constraints.txt bouquet."
        )
    return f"{len(needed)} packages as tested, flwr {version('flwr')}, torch {version('torch')}"


def quantisation(devices: Sequence[str]) -> str:
    """Quantise a layer to NF4 on every device of a node, and train an adapter over it for one step."""
    found = (each for device in devices for each in placement.find_devices(device))
    return "; ".join(map(_quantisation, dict.fromkeys(found)))


def _quantisation(device: torch.device) -> str:
    from bitsandbytes.nn.modules import Linear4bit

    torch.manual_seed(0)
    weight, x, y = torch.randn(64, 64) / 8, torch.randn(32, 64), torch.randn(32, 64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")  # type: ignore[no-untyped-call]
            layer.weight.data = weight
            layer = layer.to(device)
            adapter = nn.Sequential(nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)).to(device)
            optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
            losses = [_step(layer, adapter, optimizer, x.to(device), y.to(device)) for _ in range(2)]
            error = float((layer(torch.eye(64, device=device)).T.cpu() - weight).norm() / weight.norm())
    except (RuntimeError, AssertionError, AttributeError, ImportError) as broken:
        raise BouquetError(
            "bitsandbytes does not work here",
            where=str(device),
            got=str(broken).splitlines()[0],
            cure="Run python -m bitsandbytes to see why, or set model.quantization=none.",
        ) from broken
    if not (losses[1] < losses[0] and error < 0.2):
        raise BouquetError(
            "bitsandbytes computes wrongly here",
            where=str(device),
            expected="a falling loss and an error below 0.2",
            got=f"loss {losses[0]:.3f} then {losses[1]:.3f}, error {error:.2f}",
            cure="Install the versions of constraints.txt.",
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"NF4 trains on {name} ({device}), relative error {error:.3f}"


def _step(
    layer: nn.Module, adapter: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> float:
    loss = (layer(x) + adapter(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss)


def disk(folder: Path, least: int = LEAST_FREE) -> str:
    """Room and the right to write where checkpoints, ledgers and caches go."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    probe = existing / ".bouquet-doctor"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise BouquetError(
            "a state directory that cannot be written",
            where=str(folder),
            got=str(error.strerror),
            cure=f"Give it to the user that runs Flower: chown <user> {folder}.",
        ) from error
    if free < least:
        raise BouquetError(
            "the disk is nearly full",
            where=str(folder),
            expected=f"{least / 1e9:.1f} GB free",
            got=f"{free / 1e9:.1f} GB",
            cure="Make room, or choose another state-directory.",
        )
    return f"{free / 1e9:.0f} GB free in {folder}"


def clock() -> str:
    """Whether the clock is kept right: node keys sign the time, and certificates have a first day."""
    if not shutil.which("timedatectl"):
        raise WarningError("nothing here knows whether the clock is right", cure="Run chrony or systemd-timesyncd.")
    asked = subprocess.run(
        ["timedatectl", "show", "--property=NTPSynchronized", "--value"], capture_output=True, text=True, check=False
    )
    if asked.stdout.strip() != "yes":
        raise WarningError("the clock is not synchronised", cure="timedatectl set-ntp true.")
    return "synchronised"
