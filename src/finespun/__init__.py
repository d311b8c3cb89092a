"""finespun: a pretrained language model and your own texts → a model that writes what you need.

    import finespun

    model = finespun.load("smollm2-135m")
    model.finetune(texts, epochs=3)
    print(model.generate("Once upon a time", max_new_tokens=100))
    model.save("my-writer")

`load`, `finetune`, `Recipe`, `TextModel` and the error `FinespunError` are the public API.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finespun.errors import FinespunError
from finespun.recipe import Recipe

if TYPE_CHECKING:
    from finespun.data.sources import Items
    from finespun.text_model import TextModel

__all__ = ["FinespunError", "Recipe", "TextModel", "finetune", "load"]
__version__ = version("finespun")

# transformers imports torchao where that is installed, which then warns of CUDA libraries that are not for this machine
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def load(name: str | Path) -> TextModel:
    """The model called `name`: a known name (`finespun models`), a hub id, a run, model or adapter folder, or a `.gguf`
    file. Raises `FinespunError` naming each place that was tried."""
    from finespun.text_model import TextModel

    return TextModel.load(name)


def finetune(
    recipe: Recipe | None = None,
    *,
    data: str | Path | Items | Mapping[str, Any] | None = None,
    quiet: bool = False,
    **keywords: Any,
) -> TextModel:
    """Runs a recipe, or the one that keywords describe, and returns the trained model; its run folder is `.run`.

    `data` is a file or folder, a list of texts or of dicts, or the keys of the recipe's section `data`; other keywords
    are a recipe's keys (`model="smollm2-135m"`, `out="runs/stories"`), its sections (`training={"epochs": 2}`) or the
    bare fields of these (`epochs=2`). Raises `FinespunError`.
    """
    from finespun import finetuning
    from finespun.text_model import TextModel, recipe_and_items
    from finespun.training.progress import Reporter

    items = None
    if recipe is None:
        recipe, items = recipe_and_items(data, **keywords)
    elif data is not None or keywords:
        given, items = recipe_and_items(data, **keywords)
        recipe = Recipe.parse(recipe.model_dump(exclude_unset=True), given.model_dump(exclude_unset=True))
    return TextModel.of_run(finetuning.finetune(recipe, items, reporter=Reporter(quiet)))


def __getattr__(name: str) -> Any:
    """`TextModel` brings torch with it, so it is imported when it is asked for."""
    if name == "TextModel":
        from finespun.text_model import TextModel

        return TextModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
