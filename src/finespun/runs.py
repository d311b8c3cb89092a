"""The run folder: what a run leaves behind, and how it is read back.

recipe.yaml      the resolved recipe, which runs again as it is
manifest.json    hashes of data and base model, versions, hardware, what the data was, the results
metrics.jsonl    one object a step
dropped.jsonl    rows of the data that were left out, each with the reason
checkpoints/     step-000123/, complete states to go on from
samples.jsonl    held-out prompts with the texts before and after
model/           the trained model, a Hugging Face or PEFT folder
report.html      all of it for people
evaluations/     what was measured of the model, a folder each
.lock            held by the process that trains here
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finespun.errors import RunError
from finespun.files import append_line, write_jsonl, write_text
from finespun.recipe import Recipe


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run, with their reading and writing."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def data(self) -> Path:
        """Texts that came as Python objects, so that the stored recipe can name a file."""
        return self.path / "data.jsonl"

    @property
    def dropped(self) -> Path:
        """Rows that were left out, each with the reason."""
        return self.path / "dropped.jsonl"

    def check_free(self) -> None:
        """Raises `RunError` if the folder holds a run, or anything else, already."""
        if self.recipe_file.exists():
            raise RunError(
                f"{self.path}: already holds a run. Choose another --out, or go on with it: "
                f"finespun train --resume {self.path}"
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunError(f"{self.path}: is there already and is not empty. Choose another --out.")

    @contextmanager
    def held(self) -> Generator[None]:
        """Inside, no other process trains here; raises `RunError` where one does. The system takes the lock from a
        process that ends, however it ends."""
        lock = FileLock(self.path / ".lock", blocking=False)
        try:
            lock.acquire()
        except Timeout:
            raise RunError(f"{self.path}: another process is training here. Wait for it, or stop it.") from None
        try:
            yield
        finally:
            lock.release()

    def create(self, recipe: Recipe, manifest: Mapping[str, Any]) -> None:
        """Makes the folder with its recipe and manifest; the recipe comes last and makes it a run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be created ({error.strerror}).") from None
        self.write_manifest(manifest)
        write_text(self.recipe_file, recipe.to_yaml())

    def recipe(self, changes: Mapping[str, Any] | None = None) -> Recipe:
        """The stored recipe, with `changes` on top. Raises `RunError` where there is no run."""
        if not self.recipe_file.is_file():
            raise RunError(f"{self.path}: holds no run (there is no recipe.yaml in it).")
        return Recipe.load(self.recipe_file, changes or {})

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_text(self.path / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")

    def manifest(self) -> dict[str, Any]:
        """Raises `RunError` where it is missing or torn."""
        try:
            return json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / 'manifest.json'}: cannot be read ({error}).") from None

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        append_line(self.path / "metrics.jsonl", json.dumps(metrics))

    def metrics(self) -> list[dict[str, Any]]:
        """Metrics of all steps; a last line torn by a kill is left out."""
        found = []
        file = self.path / "metrics.jsonl"
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def keep_metrics_through(self, step: int) -> None:
        """Forgets the metrics of steps after `step`, which a resumed run takes again."""
        kept = [metrics for metrics in self.metrics() if metrics["step"] <= step]
        write_jsonl(self.path / "metrics.jsonl", kept)

    def write_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        write_jsonl(self.path / "samples.jsonl", samples)

    def samples(self) -> list[dict[str, Any]]:
        """Held-out prompts with the texts before and, at the end of a run, after; empty before they were written."""
        file = self.path / "samples.jsonl"
        return (
            [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
            if file.is_file()
            else []
        )


def default_out(name: str) -> Path:
    """`runs/name`, or `runs/name-2` and so on where that is taken."""
    stem = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    number = 1
    while (path := Path("runs") / (stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return path


def environment() -> dict[str, Any]:
    """Versions and hardware for the manifest."""
    import torch

    packages = ("finespun", "torch", "transformers", "peft", "tokenizers", "safetensors")
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "system": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    file = Path("/proc/cpuinfo")
    if file.is_file() and (
        match := re.search(r"^model name\s*:\s*(.+)$", file.read_text(encoding="utf-8", errors="ignore"), re.MULTILINE)
    ):
        return match[1]
    return platform.processor() or platform.machine()
