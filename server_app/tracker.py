"""The figures of the record in TensorBoard, MLflow or Weights & Biases: by the trackers of Accelerate.

Accelerate is here with PEFT, and keeps one interface to them all. What it sends is what an event counts: numbers. The
texts of failures stay in the record, and so do paths. Where a service is, and the key to it, are the service's own
environment variables (``MLFLOW_TRACKING_URI``, ``WANDB_API_KEY``, ...) in the environment of the coordinator's
``flower-superexec``, never settings of a run.
"""

import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from common.config.run import RunConfig
from common.error import BouquetError
from common.record.event import Event, OfNode

PROJECT = "bouquet"
# W&B takes no step below one that it has had, and a score belongs to the round before the update that it comes with.
ROUND = "round"
# What they tell their makers of this machine.
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}


class Tracker:
    """One tracker of one run. Raises :class:`BouquetError` where it is not installed or does not start."""

    def __init__(self, name: str, folder: Path, config: RunConfig) -> None:
        self.name = name
        os.environ |= {variable: value for variable, value in QUIET.items() if variable not in os.environ}
        PartialState(cpu=True)  # Accelerate's own log asks for it; there is one process here and no GPU in use
        try:
            self._tracker = _make(name, folder)
            self._tracker.start()
            self._tracker.store_init_configuration(_told(config))
            if name == "wandb":
                self._tracker.tracker.define_metric("*", step_metric=ROUND)
        except ImportError as error:
            raise BouquetError(
                "a tracker that is not installed",
                where=f"tracking.to = {name!r}",
                got=str(error),
                cure="pip install 'bouquet[tracking]' on the coordinator, or leave tracking.to empty.",
            ) from error
        except Exception as error:  # each service has its own
            raise BouquetError(
                "a tracker that does not start",
                where=f"tracking.to = {name!r}",
                got=f"{type(error).__name__}: {error}",
                cure="Set its environment where flower-superexec runs, or leave tracking.to empty.",
            ) from error

    def hear(self, event: Event) -> None:
        """Pass an event's numbers on, as ``phase/figure`` or ``phase/figure/node``."""
        after = f"/{event.node}" if isinstance(event, OfNode) else ""
        figures = {f"{event.phase}/{name}{after}": value for name, value in event.figures.items()}
        if figures and self.name == "wandb":
            self._tracker.log({**figures, ROUND: event.round})
        elif figures:
            self._tracker.log(figures, step=event.round)

    def close(self) -> None:
        """Send what is still to be sent."""
        self._tracker.finish()


def _make(name: str, folder: Path) -> GeneralTracker:
    if name == "tensorboard":
        return TensorBoardTracker("tensorboard", folder)
    if name == "mlflow":
        import mlflow

        if not mlflow.is_tracking_uri_set():
            mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        return MLflowTracker(PROJECT, run_name=folder.name)
    import wandb

    # Flower hands the run's token to this process on its command line, which W&B would send along.
    silent = wandb.Settings(
        x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True, disable_git=True, console="off"
    )
    return WandBTracker(PROJECT, name=folder.name, dir=folder, settings=silent)


def _told(config: RunConfig) -> dict[str, Any]:
    """The settings of the run, but for paths."""
    return {key: value for key, value in config.to_flower().items() if "/" not in str(value)}
