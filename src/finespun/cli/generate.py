"""`finespun generate`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from finespun.errors import DataError
from finespun.generation.settings import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finespun.generation.engine import Completion
    from finespun.text_model import Prompt


def generate(
    model: str,
    prompts: list[str] | None = None,
    /,
    *,
    prompts_file: Path | None = None,
    samples: int = 1,
    draft: str | None = None,
    sampling: Annotated[Sampling | None, Parameter(name="*")] = None,
    quiet: bool = False,
) -> None:
    """Write with a model: on a terminal as it is written, else as one JSON object a text.

    For example: finespun generate runs/stories "The lighthouse" --temperature 0.8 --samples 3

    Parameters
    ----------
    model
        A run folder, a model or adapter folder, a .gguf file, a known name or a hub id.
    prompts
        What to continue or to answer; read from standard input if there are none.
    prompts_file
        More of them: a .txt file with one a line, or a .jsonl file with `prompt` or `messages`.
    samples
        Texts for each prompt.
    draft
        A smaller model with the same tokens, which guesses several at once: a large model writes the same, faster.
    quiet
        Do not say how many texts are written.
    """
    asked: list[Prompt] = [*(prompts or []), *(_read_prompts(prompts_file) if prompts_file else [])]
    if not asked:
        if sys.stdin.isatty():
            raise DataError("There is no prompt: give one in quotes, or --prompts-file FILE.")
        asked = [sys.stdin.read().rstrip("\n")]
    settings: dict[str, Any] = sampling.model_dump(exclude_unset=True) if sampling else {}

    from finespun.text_model import TextModel
    from finespun.training.progress import Reporter

    writer = TextModel.load(model)
    terminal = sys.stdout.isatty()
    if terminal and len(asked) * samples == 1:
        writer.complete(
            asked, on_text=lambda prompt, sample, text: print(text, end="", flush=True), draft=draft, **settings
        )
        print()
        return
    printer = _Printer(asked, samples, terminal)
    try:
        # on a terminal the texts themselves show how far it is
        with Reporter(quiet or terminal).counting("Writing", "texts") as count:

            def ended(prompt: int, sample: int, completion: Completion) -> None:
                printer.take(prompt, sample, completion)
                count(printer.taken, len(asked) * samples)

            found = writer.complete(asked, samples, draft=draft, on_end=ended, **settings)
        for prompt, completions in enumerate(found):
            for sample, completion in enumerate(completions):
                printer.take(prompt, sample, completion)
    finally:  # what is written is not lost when it is interrupted
        printer.rest()


class _Printer:
    """Prints texts in the order of their prompts, each as soon as all before it have ended."""

    def __init__(self, prompts: Sequence[Prompt], samples: int, terminal: bool) -> None:
        self._prompts, self._samples, self._terminal = prompts, samples, terminal
        self._waiting: dict[tuple[int, int], Completion] = {}
        self._printed = 0

    @property
    def taken(self) -> int:
        """Texts that have ended."""
        return self._printed + len(self._waiting)

    def take(self, prompt: int, sample: int, completion: Completion) -> None:
        """A text that has ended; nothing happens to one that is printed."""
        if prompt * self._samples + sample < self._printed:
            return
        self._waiting[prompt, sample] = completion
        while (at := divmod(self._printed, self._samples)) in self._waiting:
            self._print(*at, self._waiting.pop(at))
            self._printed += 1

    def rest(self) -> None:
        """Prints what has ended before something that has not."""
        for at in sorted(self._waiting):
            self._print(*at, self._waiting[at])

    def _print(self, number: int, sample: int, completion: Completion) -> None:
        prompt = self._prompts[number]
        if self._terminal:
            words = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            count = f" ({sample + 1})" if self._samples > 1 else ""
            print(f"--- {words}{count}\n{completion.text}\n", flush=True)
        else:
            told = {key: value for key, value in asdict(completion).items() if value is not None}
            print(json.dumps({"prompt": prompt, **told}, ensure_ascii=False), flush=True)


def _read_prompts(path: Path) -> list[Prompt]:
    from finespun.data.readers import BadRow
    from finespun.data.sources import open_sources, rows_of

    found: list[Prompt] = []
    for row in rows_of(*open_sources([str(path)], documents="lines")):
        if isinstance(row, BadRow):
            raise DataError(str(row))
        prompt = next((row.columns[key] for key in ("prompt", "messages", "text") if key in row.columns), None)
        if prompt is None:
            raise DataError(
                f"{row.origin}: has neither `prompt` nor `messages`; it has {', '.join(map(repr, row.columns))}."
            )
        found.append(prompt)
    return found
