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
    """
    asked: list[Prompt] = [*(prompts or []), *(_read_prompts(prompts_file) if prompts_file else [])]
    if not asked:
        if sys.stdin.isatty():
            raise DataError("There is no prompt: give one in quotes, or --prompts-file FILE.")
        asked = [sys.stdin.read().rstrip("\n")]
    settings: dict[str, Any] = sampling.model_dump(exclude_unset=True) if sampling else {}

    from finespun.text_model import TextModel

    writer = TextModel.load(model)
    terminal = sys.stdout.isatty()
    if terminal and len(asked) * samples == 1:
        writer.complete(
            asked, on_text=lambda prompt, sample, text: print(text, end="", flush=True), draft=draft, **settings
        )
        print()
        return
    for prompt, completions in zip(asked, writer.complete(asked, samples, draft=draft, **settings), strict=True):
        for number, completion in enumerate(completions, 1):
            if terminal:
                words = prompt if isinstance(prompt, str) else prompt[-1]["content"]
                print(f"--- {words}" + (f" ({number})" if samples > 1 else "") + f"\n{completion.text}\n")
            else:
                told = {key: value for key, value in asdict(completion).items() if value is not None}
                print(json.dumps({"prompt": prompt, **told}, ensure_ascii=False))


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
