"""`TextModel`: a language model to write with, to train and to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from pydantic import ValidationError

from finespun.data.formats import Message
from finespun.data.sources import Items
from finespun.data.templates import Encoder
from finespun.errors import RecipeError, RunError
from finespun.finetuning import FinishedRun, finetune
from finespun.generation.engine import Completion, Engine, generate
from finespun.generation.settings import Sampling
from finespun.models.adapters import merge
from finespun.models.load import LoadedModel, load_model, save_model
from finespun.recipe import Recipe, explain
from finespun.runs import RunFolder
from finespun.training.progress import Reporter

Prompt = str | Sequence[Message]


DRAFT_TOKENS = 4
"""So many tokens a draft guesses at once, unless the person says how many."""


class TextModel:
    """A causal language model with its tokenizer and its way of being prompted.

    `run` is the folder of the run that trained it last, if this object has seen one.
    """

    def __init__(
        self, source: str, loaded: LoadedModel, encoder: Encoder | None = None, run: RunFolder | None = None
    ) -> None:
        self._source = source  # the name under which `load` gives this model again
        self._loaded = loaded
        self.encoder = encoder or Encoder(loaded.tokenizer)
        self.run = run

    @classmethod
    def load(cls, name: str | Path) -> TextModel:
        """The model called `name`: a known name (`finespun models`), a hub id, a run folder, a model or adapter folder,
        or a `.gguf` file. Raises `ModelNotFound` or `ModelError`."""
        return cls(str(name), load_model(str(name)))

    @classmethod
    def of_run(cls, finished: FinishedRun) -> TextModel:
        """The model that a run has just trained."""
        return cls(str(finished.folder.path), finished.loaded, finished.encoder, finished.folder)

    def engine(self, slots: int | None = None) -> Engine:
        """What continues many requests of this model, at most `slots` at once; until it is trained again."""
        return Engine(self._loaded, self.encoder, slots)

    @overload
    def generate(self, prompt: str, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[Prompt], **sampling: Any) -> list[str]: ...
    def generate(self, prompt: str | Sequence[Prompt], **sampling: Any) -> str | list[str]:
        """What the model writes after `prompt`, without the prompt: a text, or a list of texts for a list of prompts.

        A prompt is a text or a conversation (a list of messages). Keywords are the fields of `Sampling`, such as
        `max_new_tokens`, `temperature`, `stop` and `seed`, and `draft` (see `complete`). Greedy by default. Raises
        `RecipeError` for a setting that cannot be, `DataError` for a prompt that does not fit, `GenerationError` for a
        constraint that cannot be followed.
        """
        if isinstance(prompt, str):
            return self.complete([prompt], **sampling)[0][0].text
        return [samples[0].text for samples in self.complete(prompt, **sampling)]

    def complete(
        self,
        prompts: Sequence[Prompt],
        samples: int = 1,
        on_text: Callable[[int, int, str], None] | None = None,
        draft: TextModel | str | Path | None = None,
        on_end: Callable[[int, int, Completion], None] = lambda prompt, sample, completion: None,
        **sampling: Any,
    ) -> list[list[Completion]]:
        """`samples` continuations of each prompt, with the reason why each ended and its counts of tokens.
        `on_text(prompt, sample, text)` gets each new piece of text as it is written, `on_end` each continuation that
        has ended, in whichever order, where it is not the best of several. `draft`, a smaller model with the
        same tokens, guesses `draft_tokens` at once, which makes a large one faster and changes nothing of what it
        writes; `GenerationError` for one with other tokens."""
        if draft is not None:
            sampling = {"draft_tokens": DRAFT_TOKENS} | sampling
        try:
            settings = Sampling(**sampling)
        except ValidationError as error:
            raise RecipeError(explain(error, Sampling.model_fields)) from None
        if samples < 1:
            raise RecipeError(f"`samples` should be at least 1 (given: {samples})")
        encoded = [self.encoder.encode_prompt(prompt) for prompt in prompts]
        if isinstance(draft, str | Path):
            draft = TextModel.load(draft)
        small = draft._loaded if draft else None
        return generate(self._loaded, self.encoder, encoded, settings, samples, on_text, small, on_end)

    def finetune(self, data: str | Path | Items | Mapping[str, Any], quiet: bool = False, **keywords: Any) -> TextModel:
        """Trains this model on `data`: a file or folder, a list of texts or of dicts, or the keys of the recipe's
        section `data`. Keywords are those of a recipe (`epochs=3`, `method="lora"`, `out="runs/stories"`). Returns
        itself, trained; the run folder is `self.run`. Raises the errors of `finespun.errors`."""
        recipe, items = recipe_and_items(data, model=self._source, **keywords)
        vars(self).update(vars(TextModel.of_run(finetune(recipe, items, Reporter(quiet)))))
        return self

    def save(self, folder: str | Path, merge_adapter: bool = False) -> Path:
        """Writes the model to a new `folder`: a Hugging Face folder or, for a model with an adapter, a PEFT one, unless
        `merge_adapter` folds the adapter into the weights (also of this object). Raises `RunError`."""
        path = Path(folder)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(f"{path}: is there already and is not empty. Choose another folder.")
        if merge_adapter and self._loaded.has_adapter:
            self._loaded.model = merge(self._loaded.model)
        save_model(self._loaded, self.encoder.stop_ids, path)
        self._source = str(path)
        return path


def recipe_and_items(
    data: str | Path | Items | Mapping[str, Any] | None, **keywords: Any
) -> tuple[Recipe, Items | None]:
    """The recipe that Python keywords describe, and the data where it is a list in memory instead of files."""
    if data is None:
        return Recipe.from_keywords(**keywords), None
    if isinstance(data, str | Path | Mapping):
        return Recipe.from_keywords(data=dict(data) if isinstance(data, Mapping) else str(data), **keywords), None
    return Recipe.from_keywords(**keywords), list(data)
