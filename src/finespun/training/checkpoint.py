"""Checkpoints: all that a run needs to go on as if it had never stopped.

`checkpoints/step-000123/` holds `weights.safetensors` (what is trained, float32), `optimizer.safetensors` and
`state.json` with their SHA-256. Order, data position, noise and learning rate need no file: they are functions of the
seed and the step.
A folder with that name is complete, since it gets the name last; one whose files changed later is not used.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from finespun.errors import RunError
from finespun.files import new_folder
from finespun.models.catalog import file_sha256
from finespun.recipe import VALIDATION_LOSS


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands after `step` steps; `best_value` is the best so far of what it is judged by, `best_by`: the
    validation loss (nats a token), or a metric. `micro_batch_tokens` is what fits into memory, where that has turned
    out to be less than was planned. `unmeasured` are the metrics of the step where the run was stopped before it had
    all of them."""

    step: int = 0
    micro_batch_tokens: int | None = None
    best_step: int | None = None
    best_value: float | None = None
    best_by: str = VALIDATION_LOSS
    unmeasured: dict[str, Any] | None = None

    @property
    def recorded(self) -> int:
        """The last step of which all metrics are known."""
        return self.step if self.unmeasured is None else self.step - 1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: TrainingState

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "weights.safetensors")

    def moments(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "optimizer.safetensors")


def save_checkpoint(
    folder: Path,
    state: TrainingState,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    keep: int = 1,
) -> None:
    """Writes a checkpoint under `folder`, then removes all but the `keep` newest and the best one.

    Raises `RunError` where the disk does not take it; the earlier ones are then still there.
    """
    with new_folder(_path(folder, state.step)) as new:
        hashes = {}
        for name, tensors in (("weights.safetensors", weights), ("optimizer.safetensors", moments)):
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, new / name)
            hashes[name] = file_sha256(new / name)
        (new / "state.json").write_text(
            json.dumps({**asdict(state), "sha256": hashes}, indent=2) + "\n", encoding="utf-8"
        )
    for torn in folder.glob(".step-*"):  # what a killed process left behind
        shutil.rmtree(torn, ignore_errors=True)
    for path in sorted(folder.glob("step-*"))[:-keep]:
        if path != _path(folder, state.best_step):
            shutil.rmtree(path)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete and undamaged checkpoint under `folder`, or None."""
    return next(filter(None, (_read(path) for path in sorted(folder.glob("step-*"), reverse=True))), None)


def best_checkpoint(folder: Path, state: TrainingState) -> Checkpoint:
    """The checkpoint of the best step, or the newest one of a run that has none.

    Raises `RunError` if it is gone or damaged.
    """
    found = _read(_path(folder, state.best_step)) if state.best_step is not None else newest_checkpoint(folder)
    if found is None:
        raise RunError(f"{folder}: the best checkpoint is missing or damaged.")
    return found


def _path(folder: Path, step: int | None) -> Path:
    return folder / f"step-{step or 0:06d}"


def _read(path: Path) -> Checkpoint | None:
    try:
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        hashes = content.pop("sha256")
        if all(file_sha256(path / name) == digest for name, digest in hashes.items()):
            return Checkpoint(path, TrainingState(**content))
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return None
