"""`finespun data check`, `show` and `select`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from finespun.errors import RecipeError
from finespun.recipe import DataRecipe, Recipe

app = App(name="data", help="Look at data before a run: check it, show what is trained, select from it.")

Files = Annotated[list[str], Parameter(negative=())]
DataOptions = Annotated[DataRecipe | None, Parameter(name="data")]


@app.command
def check(
    files: Files,
    /,
    *,
    model: str | None = None,
    data: DataOptions = None,
    page: Path | None = None,
    quiet: bool = False,
) -> None:
    """Say what data is and what is wrong with it, on the terminal and as an HTML page.

    For example: finespun data check pairs.jsonl --model smollm2-135m

    The exit code is 1 where training would refuse the data as it is.

    Parameters
    ----------
    files
        What train takes as --data, or a recipe (.yaml).
    model
        Whose tokens are counted [default: the recipe's, or smollm2-135m if it is on this machine].
    page
        The page to write [default: the name of the data with .check.html].
    quiet
        Print nothing but errors.
    """
    recipe = _recipe(files, model, data)

    from finespun import inspection
    from finespun.reports.data import check_lines, write_check
    from finespun.training.progress import Reporter

    with Reporter(quiet).counting("checking", "rows") as on_row:
        found = inspection.check(recipe, on_row)
    name = Path(files[0]).name if files[0] != "-" else "standard input"
    page = page or Path(f"{Path(name).stem}.check.html")
    write_check(found, page, name, recipe.model)
    if not quiet:
        print(*check_lines(found), f"Page: {page}", sep="\n")
    if found.stops:
        sys.exit(1)


@app.command
def show(
    files: Files,
    /,
    *,
    model: str | None = None,
    data: DataOptions = None,
    count: int = 3,
    row: int | None = None,
) -> None:
    """Print examples as a model is trained on them: trained tokens in one colour, context in another.

    For example: finespun data show chats.jsonl --model smollm2-135m --row 17

    Special tokens are written out. Where there are no colours, trained tokens stand between ⟦ and ⟧.

    Parameters
    ----------
    files
        What train takes as --data, or a recipe (.yaml).
    model
        Whose tokenizer and template are used [default: the recipe's, or smollm2-135m].
    count
        How many rows are shown, from the first.
    row
        Show the row with this number instead.
    """
    recipe = _recipe(files, model, data)

    from rich.console import Console
    from rich.text import Text

    from finespun import inspection
    from finespun.data.readers import BadRow

    console = Console(highlight=False, soft_wrap=True)
    colours = console.is_terminal and not console.no_color
    for example in inspection.show(recipe, count, row):
        if isinstance(example, BadRow):
            console.print(Text(f"--- {example}\n"))
            continue
        console.print(
            Text(f"--- {example.origin}: {example.tokens} tokens, {example.trained_tokens} trained", style="bold")
        )
        line = Text()
        for text, weight in example.pieces:
            mark = f" weight {weight:g}" if weight not in (0.0, 1.0) else ""
            if colours:
                line.append(text + mark, style="black on bright_green" if weight else "cyan")
            else:
                line.append(f"⟦{text}⟧{mark}" if weight else text)
        console.print(line, end="\n\n")


@app.command
def select(
    pool: Files,
    /,
    *,
    like: Annotated[list[str], Parameter(negative=(), consume_multiple=True)],
    keep: int,
    out: Path | None = None,
    data: DataOptions = None,
    seed: int = 0,
) -> None:
    """Select from a pool the rows that are most like a sample of what a model should write.

    For example: finespun data select all.jsonl --like wanted.jsonl --keep 2000 --out selected.jsonl

    Rows are ranked by importance (DSIR, Xie et al. 2023); of near-duplicates one is taken.

    Parameters
    ----------
    pool
        Sources to select from.
    like
        Sources of texts like those that are wanted; some hundred will do.
    keep
        Rows to select.
    out
        The file to write, the most important row first [default: selected.jsonl].
    seed
        Of the noise that keeps the selection as varied as the target is.
    """
    recipe = _recipe(pool, None, data)

    from finespun import inspection
    from finespun.reports.data import selection_lines

    out = out or Path("selected.jsonl")
    selection, left_out = inspection.select_rows(recipe.data, like, keep, out, seed)
    print(*selection_lines(selection, keep, left_out), f"Written: {out}", sep="\n")


def _recipe(files: list[str], model: str | None, data: DataRecipe | None) -> Recipe:
    """The recipe that the options say."""
    given: dict = {"data": data.model_dump(exclude_unset=True)} if data else {}
    if model:
        given["model"] = model
    if files[0].lower().endswith((".yaml", ".yml")):
        if len(files) > 1:
            raise RecipeError(f"{files[0]}: a recipe names its data; give it alone.")
        return Recipe.load(files[0], given)
    given.setdefault("data", {})["source"] = list(files)
    return Recipe.parse(given)
