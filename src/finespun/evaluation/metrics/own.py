"""A person's own metric: a function of an output and its references."""

from __future__ import annotations

import importlib
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from hashlib import sha256
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from finespun.errors import DataError, RecipeError
from finespun.evaluation.metrics.base import Better, Mean, Metric, checked
from finespun.evaluation.outputs import Output
from finespun.recipe import nearest


def load_metric(name: str) -> Metric:
    """The metric `module:function`; the module is looked for in the current folder, too.

    `function(output: str, references: list[str]) -> float` scores one example; the metric is the mean. Higher is taken
    to be better, unless the function has an attribute `better` that says "lower" or None. Raises `RecipeError` where it
    cannot be loaded; `measure` raises `DataError` where it fails or gives what is no number.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise RecipeError(f"{name!r} is no metric of your own: write module:function, such as my_metrics:rhymes.")
    module = _module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        close = nearest(function_name, known) if known else None
        raise RecipeError(
            f"{name}: {module.__file__ or module_name} has no function {function_name}."
            + (f" Did you mean {close}?" if close else "")
        )
    better = getattr(function, "better", "higher")
    if better not in ("higher", "lower", None):
        raise RecipeError(f'{name}: its `better` should be "higher", "lower" or None (given: {better!r}).')
    return _Own(name, function, better, Path(module.__file__ or ""))


def _module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0] and error.name != name:
            raise RecipeError(f"{name} needs the module {error.name}, which is not installed.") from None
        raise RecipeError(f"There is no module {name}: looked for {name}.py in {here} and among packages.") from None
    except SyntaxError as error:  # says where by itself
        raise RecipeError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from None
    except Exception as error:
        raise RecipeError(f"{name} cannot be loaded: {_said(error)}") from error


class _Own:
    needs_references = False

    def __init__(self, name: str, function: Callable[[str, list[str]], Any], better: Better, file: Path) -> None:
        digest = sha256(file.read_bytes()).hexdigest()[:12] if file.is_file() else "unknown"
        self.name, self.better, self.signature = name, better, f"{name}|sha256:{digest}"
        self._function, self._file = function, file

    def measure(self, outputs: Sequence[Output]) -> Mean:
        return Mean(np.array([self._score(output) for output in checked(self, outputs)]))

    def _score(self, output: Output) -> float:
        try:
            score = self._function(output.text, list(output.references))
        except Exception as error:
            raise DataError(f"{self.name} failed at {output.origin}: {_said(error, self._file)}") from error
        if not isinstance(score, Real | np.bool) or not math.isfinite(score):
            raise DataError(
                f"{self.name} gives {score!r} at {output.origin}, and should give a finite number. "
                "Return one for every output, also an empty one."
            )
        return float(score)


def _said(error: Exception, file: Path | None = None) -> str:
    """An error in one line, with the line of the person's own `file` that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) == file] or frames
    return f"{type(error).__name__}: {error} ({own[-1].filename}, line {own[-1].lineno})"
