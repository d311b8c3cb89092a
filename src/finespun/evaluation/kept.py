"""What an evaluation has computed is put down at once, each by itself: an interrupted one goes on where it was, and one
that asks for the same again, such as with other metrics, finds it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finespun.data.templates import Encoder
from finespun.files import append_line, data_cache, forget_old, hash_of, read_appended
from finespun.generation.engine import Completion, generate
from finespun.generation.settings import Sampling
from finespun.models.load import LoadedModel

TOGETHER = 32
"""Prompts that are put down at once where they are not written one by one."""


class Kept:
    """Results by their keys, in a file of the cache to which each is added as it comes. `parts` is all that they depend
    on, beside their keys. A last line that a kill tore is passed over."""

    def __init__(self, kind: str, parts: Any) -> None:
        self._file: Path = data_cache() / "evaluations" / f"{kind}-{hash_of(parts)}.jsonl"
        self._found: dict[str, Any] = dict(value for _, value in read_appended(self._file))
        if self._file.is_file():
            self._file.touch()  # what is used is not forgotten
        else:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            forget_old(self._file.parent)

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Any:
        return self._found[key]

    def add(self, key: str, value: Any) -> None:
        """Puts down `value`, which JSON can hold. Raises `RunError` where the disk does not take it."""
        append_line(self._file, json.dumps([key, value], ensure_ascii=False))
        self._found[key] = value


def write_all(
    loaded: LoadedModel,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    kept: Kept,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Completion]:
    """What the model writes for each of `prompts` (token ids). What is in `kept` is not written again; `on_done` gets
    the number of prompts that are done. Raises `GenerationError` for a constraint that cannot be followed."""
    keys = [hash_of(list(prompt)) for prompt in prompts]
    todo = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in kept}
    done = len(prompts) - len(todo)
    on_done(done)

    def keep(key: str, completion: Completion) -> None:
        nonlocal done
        kept.add(
            key, [completion.text, completion.finish_reason, completion.prompt_tokens, completion.completion_tokens]
        )
        done += 1
        on_done(done)

    if todo and sampling.changed("beams", "best_of"):
        # always the same prompts side by side, so that what was interrupted goes on as it would have
        everything = dict(sorted(zip(keys, prompts, strict=True), key=lambda item: -len(item[1])))
        for first in range(0, len(everything), TOGETHER):
            group = dict(list(everything.items())[first : first + TOGETHER])
            if todo.keys() & group.keys():
                written = generate(loaded, encoder, list(group.values()), sampling)
                for key, (completion,) in zip(group, written, strict=True):
                    if key in todo:
                        keep(key, completion)
    elif todo:
        order = list(todo)
        generate(
            *(loaded, encoder, list(todo.values()), sampling),
            on_end=lambda prompt, sample, completion: keep(order[prompt], completion),
        )
    return [Completion(*kept[key]) for key in keys]
