"""The command line: each command parses, calls the library and prints. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter, UnknownOptionError
from pydantic import ValidationError

from finespun.errors import FinespunError, TrainingInterrupted
from finespun.evaluation.judging.settings import JudgeServerSettings, StudySettings
from finespun.evaluation.settings import BenchmarkSettings, EvaluationSettings, LLMJudgeSettings
from finespun.generation.settings import Sampling
from finespun.recipe import explain, known_keys, nearest
from finespun.serving.settings import ServerSettings

INTERRUPTED = 130
"""Exit code of a run that was asked to stop, as shells give it for Ctrl-C."""

KEYS = [
    *known_keys(),
    *Sampling.model_fields,
    *ServerSettings.model_fields,
    *EvaluationSettings.model_fields,
    *BenchmarkSettings.model_fields,
    *LLMJudgeSettings.model_fields,
    *StudySettings.model_fields,
    *JudgeServerSettings.model_fields,
]
"""All that options can set."""

app = App(
    name="finespun",
    help="Turn a pretrained language model and your own texts into a model that writes what you need.",
    help_format="plaintext",
    version_flags=["--version"],
    result_action="return_value",
    default_parameter=Parameter(negative=()),
)
# named, not imported: what a command needs is loaded when it is called
app.command("finespun.cli.train:train", help="Fine-tune a model on texts.")
app.command("finespun.cli.generate:generate", help="Write with a model.")
app.command("finespun.cli.chat:chat", help="Talk with a model.")
app.command("finespun.cli.evaluate:evaluate", help="Measure how good what a model writes is.")
app.command("finespun.cli.compare:compare", help="Say which of several systems writes better, and how sure that is.")
app.command("finespun.cli.export:export", help="Write a trained model for other programs.")
app.command("finespun.cli.serve:serve", help="Serve models to programs that speak OpenAI's API.")
app.command("finespun.cli.judge:app", name="judge", help="Let people compare what models wrote, blind.")
app.command("finespun.cli.data:app", name="data", help="Look at data before a run: check, show, select.")
app.command("finespun.cli.models:models", help="List the known models and which of them are on this machine.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command. A person's mistake is one message on stderr and exit code 2; a bug keeps its traceback."""
    tokens = _spelled_out(sys.argv[1:] if arguments is None else arguments)
    try:
        app(tokens, exit_on_error=False, print_error=False)
    except TrainingInterrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (FinespunError, CycloptsError) as error:
        print(f"finespun: {_message(error)}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)  # whoever read our output has read enough


def _spelled_out(arguments: Sequence[str]) -> list[str]:
    """`--data FILE` is short for `--data.source FILE`; a `-` behind an option is its value, which cyclopts takes only
    behind an equals sign, and one that stands alone is the data, which it takes only behind `--`."""
    tokens: list[str] = []
    behind: list[str] = []
    for token in arguments:
        if token == "-" and tokens and tokens[-1].startswith("--") and "=" not in tokens[-1]:
            tokens[-1] += "=-"
        elif token == "-":
            behind = ["--", "-"]
        elif token == "--data" or token.startswith("--data="):
            tokens.append("--data.source" + token[len("--data") :])
        else:
            tokens.append(token)
    return tokens + behind


def _message(error: Exception) -> str:
    if isinstance(error.__cause__, ValidationError):
        return explain(error.__cause__, KEYS)
    if isinstance(error, UnknownOptionError):
        word = error.token.keyword or error.token.value
        guess = nearest(word.lstrip("-").replace("-", "_"), KEYS)
        return f"unknown option {word}" + (f"; did you mean --{guess.replace('_', '-')}?" if guess else ".")
    return str(error)
