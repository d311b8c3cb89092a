"""`finespun chat`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from finespun.errors import FinespunError, GenerationError
from finespun.generation.settings import Sampling

if TYPE_CHECKING:
    from finespun.conversation import Conversation

HELP = """/system TEXT    what the model is told before the conversation (without TEXT: nothing)
/reset          begin anew
/undo           take the last turn back
/regenerate     another answer to it
/save FILE      add the conversation to a .jsonl file, which `finespun train` reads
/SETTING VALUE  /temperature 0.8, /top_p 0.9, /max_new_tokens 100, /stop ["."] … for the answers to come
/exit           or the end of the input
\"""             begins and ends a text of several lines"""


def chat(
    model: str,
    /,
    *,
    beside: str | None = None,
    sampling: Annotated[Sampling | None, Parameter(name="*")] = None,
) -> None:
    """Talk with a model. Over a pipe each line is a turn.

    For example: finespun chat runs/stories --temperature 0.8 --beside smollm2-135m

    Parameters
    ----------
    model
        A run folder, a model or adapter folder, a .gguf file, a known name or a hub id.
    beside
        Another model that gets the same turns, such as the one before training.
    """
    from finespun.conversation import Conversation
    from finespun.text_model import TextModel

    settings = sampling or Sampling()
    partners = {name: Conversation(TextModel.load(name), settings) for name in [model, *([beside] if beside else [])]}
    terminal = sys.stdin.isatty()
    if terminal:
        print("/help shows the commands, Ctrl-D ends.")
    for name, partner in partners.items():
        if not partner.has_turns:
            print(f"{name} has no chat template: it continues each text by itself.", file=sys.stderr)
    for text in _turns(terminal):
        if text == "/exit":
            return
        try:
            _answer(text, partners)
        except FinespunError as error:
            if not terminal:
                raise
            print(error, file=sys.stderr)


def _turns(terminal: bool) -> Iterator[str]:
    """What the person says, turn by turn, until the input ends."""
    if terminal:
        import readline  # noqa: F401  # input() then knows the arrow keys
    block: list[str] | None = None
    while True:
        try:
            line = input(("... " if block is not None else "> ") if terminal else "")
        except EOFError:
            if block:
                yield "\n".join(block)
            return
        except KeyboardInterrupt:
            print()
            return
        if line.strip() == '"""':
            if block is not None:
                yield "\n".join(block)
            block = [] if block is None else None
        elif block is not None:
            block.append(line)
        elif line.strip():
            yield line


def _answer(text: str, partners: dict[str, Conversation]) -> None:
    """Does what a turn asks of each of `partners`."""
    command, _, rest = text[1:].partition(" ") if text.startswith("/") else ("", "", "")
    rest = rest.strip()
    if text.startswith("//") or not command:
        _each(partners, lambda partner, show: partner.say(text.removeprefix("/") if command else text, show))
    elif command == "help":
        print(HELP)
    elif command == "regenerate":
        _each(partners, lambda partner, show: partner.regenerate(show))
    elif command == "save":
        if not rest:
            raise GenerationError("/save needs the name of a file.")
        for name, partner in partners.items():
            file = Path(rest)
            partner.save(file if len(partners) == 1 else file.with_stem(f"{file.stem}-{Path(name).name}"))
    else:
        for partner in partners.values():
            _change(partner, command, rest)


def _change(partner: Conversation, command: str, rest: str) -> None:
    if command == "system":
        partner.system = rest or None
    elif command == "reset":
        partner.turns.clear()
    elif command == "undo":
        partner.undo()
    else:
        partner.set(command.replace("-", "_"), rest)


def _each(partners: dict[str, Conversation], answer: Callable[[Conversation, Callable[[str], None]], str]) -> None:
    """Each partner's answer: as it is written, or, of two on a terminal, side by side."""
    if len(partners) > 1 and sys.stdout.isatty():
        _side_by_side(list(partners), [answer(partner, lambda piece: None) for partner in partners.values()])
        return
    for name, partner in partners.items():
        if len(partners) > 1:
            print(f"[{name}]")
        answer(partner, lambda piece: print(piece, end="", flush=True))
        print()


def _side_by_side(names: Sequence[str], answers: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*names, expand=True)
    table.add_row(*map(Text, answers))  # an answer is no markup
    Console().print(table)
