"""What a person can say about an evaluation. Light to import: the command line shows it in its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import Field, field_validator, model_validator

from finespun.recipe import Documents, Format, Section, TemplateRecipe


class EvaluationData(Section):
    """The test data, and how it is read where that is not as the run's own data was."""

    source: list[str] | None = None
    """The test data: files, folders, patterns, hf:NAME[CONFIG]:SPLIT, - for standard input, or fables. Rows are as in
    training, or have `prompt` and `references`, a list of texts; rows with the same prompt are references to it."""
    format: Format | None = None
    """What the rows are [default: as the run's data, or seen from their columns]."""
    columns: dict[str, str] | None = None
    """Own names of columns [default: the run's]."""
    template: TemplateRecipe | None = None
    """Jinja templates over the columns of a row [default: the run's]."""
    encoding: str | None = None
    """Encoding of text files [default: the run's, or found out]."""
    documents: Documents | None = None
    """What separates the documents of a .txt file [default: as in the run's data]."""


class BenchmarkSettings(Section):
    """Which standard benchmarks a model takes, and how."""

    tasks: Annotated[list[str], Parameter(consume_multiple=True)] = Field(default_factory=list)
    """Standard benchmarks instead of test data: names of lm-eval's tasks and groups, such as hellaswag or mmlu,
    patterns of them, or YAML files of tasks."""
    tasks_folder: Path | None = None
    """A folder with tasks of your own, as YAML files for lm-eval. Python code that they name is run."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Solved examples before each question [default: as the task has it]."""
    apply_chat_template: bool = False
    """Put the questions as a conversation, through the model's chat template."""

    @field_validator("tasks")
    @classmethod
    def _one_by_one(cls, value: list[str]) -> list[str]:
        """`--tasks arc_easy,arc_challenge` names two; one that is named twice is taken once."""
        return list(dict.fromkeys(name.strip() for given in value for name in given.split(",") if name.strip()))


class EvaluationSettings(Section):
    """What is measured, and on what."""

    metrics: list[str] | None = None
    """Names of metrics, or module:function for your own [default: what fits the data]."""
    language: str | None = None
    """Language of the texts, such as en or zh, which decides how they are cut into words [default: told from them]."""
    likelihood: Literal["completions", "all", "off"] = "completions"
    """Measure how well the model predicts the completions (of plain texts: all of them), all text, or leave it out."""
    window: Annotated[int, Field(ge=2)] | None = None
    """Texts longer than so many tokens are read in sliding windows of this length [default: the model's context]."""
    stride: Annotated[int, Field(ge=1)] | None = None
    """Tokens by which a window moves on [default: half a window]."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Evaluate the first so many examples only."""
    exclude_trained: bool = False
    """Leave out test rows that the run was trained on."""

    @field_validator("metrics")
    @classmethod
    def _one_by_one(cls, value: list[str] | None) -> list[str] | None:
        """`--metrics BLEU,chrF++` names two."""
        return value and [name.strip() for given in value for name in given.split(",") if name.strip()]

    @model_validator(mode="after")
    def _windows_overlap(self) -> EvaluationSettings:
        if self.window and self.stride and self.stride >= self.window:
            raise ValueError("`stride` must be below `window`, so that each token has something before it")
        return self


class LLMJudgeSettings(Section):
    """The model that judges each two outputs of a comparison, if one does."""

    judge_url: str | None = None
    """An OpenAI-compatible address whose model judges each two outputs; its key is read from the environment variable
    FINESPUN_JUDGE_API_KEY."""
    judge_model: str | None = None
    """The name of that model."""
    rubric: Path | None = None
    """A text file that says what a better output is."""
    judge_examples: Annotated[int, Field(ge=1)] | None = None
    """Judge so many examples only, drawn by chance."""
    judge_concurrency: Annotated[int, Field(ge=1)] = 4
    """So many questions are under way at once."""
    judge_max_tokens: int = 1024
    """Longest reply of the judging model; one that thinks first needs more."""
    judge_timeout: float = 120.0
    """Seconds that a reply may take."""
