from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finespun.errors import RunError
from finespun.training.checkpoint import TrainingState, best_checkpoint, newest_checkpoint, save_checkpoint


def save(folder: Path, step: int, best: int | None = None, keep: int = 1) -> None:
    save_checkpoint(
        folder,
        TrainingState(step, best_step=best, best_value=1.0 if best else None),
        {"w": torch.full((3,), float(step))},
        {"w/step": torch.tensor(step)},
        keep,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        save(tmp_path, step, best)
    assert names(tmp_path) == ["step-000002", "step-000004"]
    assert newest_checkpoint(tmp_path).state == TrainingState(4, best_step=2, best_value=1.0)
    assert best_checkpoint(tmp_path, TrainingState(4, best_step=2, best_value=1.0)).weights()["w"][0] == 2


def test_as_many_of_the_newest_are_kept_as_asked_for(tmp_path: Path) -> None:
    (tmp_path / ".step-000001.tmp-77").mkdir()
    for step in range(1, 7):
        save(tmp_path, step, best=2, keep=3)
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005", "step-000006"]


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path, 5, 5)
    save(tmp_path, 6, 5)
    path = tmp_path / "step-000006" / file
    content = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(content[:-4] if damage == "truncate" else content[:-4] + b"\x7f\x01\x7f\x01")
    assert newest_checkpoint(tmp_path).state.step == 5


def test_half_written_ones_do_not_count(tmp_path: Path) -> None:
    (tmp_path / ".step-000009.tmp-1").mkdir()
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(RunError, match="missing or damaged"):
        best_checkpoint(tmp_path, TrainingState(9, best_step=9, best_value=1.0))
