"""The recipe: everything that a run can be told, in one validated place.

A YAML file, command-line flags and Python keywords all end here, so they can only say the same things. A field left
at `None` is decided when the run starts, from the model and the data, and the decision is written into the run's own
`recipe.yaml`, which then describes the run completely.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from rapidfuzz import fuzz

from finespun.errors import RecipeError

Documents = Literal["blank-lines", "lines", "files"]
Format = Literal[
    "text",
    "prompt-completion",
    "alpaca",
    "sharegpt",
    "chat",
    "question-answer",
    "translation",
    "summarization",
    "preference",
    "rated",
]
PromptFormat = Literal["chat", "raw"]
ChatTemplate = Literal["plain", "chatml"]
TrainOn = Literal["all", "last"]
TooLong = Literal["refuse", "cut", "cut-left", "skip", "split"]
Method = Literal["full", "lora", "qlora", "prompt-tuning", "prefix-tuning"]
Optimizer = Literal["adamw", "adamw-8bit", "adafactor", "muon", "lion", "schedule-free-adamw"]
Schedule = Literal["cosine", "linear", "constant", "warmup-stable-decay"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]

METRICS = (
    *("BLEU", "chrF++", "TER", "webnlg-bleu"),
    *("ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum"),
    *("ROUGE-1-mean", "ROUGE-2-mean", "ROUGE-L-mean", "ROUGE-Lsum-mean"),
    *("METEOR", "exact-match", "token-F1"),
    *("distinct-1", "distinct-2", "distinct-3", "self-BLEU", "rep-4", "loops", "length", "ended"),
    *("copied-4", "longest-copy"),
)
METRICS_WITH_A_MODEL = ("BERTScore", "MAUVE")
"""What `finespun evaluate` measures on outputs, by name; the latter with the model that is named after a colon."""

VALIDATION_LOSS = "validation_loss"


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values are not coerced into something else silently."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class TemplateRecipe(Section):
    """Jinja templates that make an example out of a row's columns: `prompt` with `completion`, or `text` alone."""

    prompt: str | None = None
    """Jinja template of the prompt, e.g. "Write a fable titled {{ title }}."."""
    completion: str | None = None
    """Jinja template of the completion, which is what the model learns to write."""
    text: str | None = None
    """Jinja template of a whole text, for training without a prompt."""

    @model_validator(mode="after")
    def _one_shape(self) -> TemplateRecipe:
        if (self.text is None) == (self.prompt is None and self.completion is None) or (
            (self.prompt is None) != (self.completion is None)
        ):
            raise ValueError("a template gives either prompt and completion, or text")
        return self


class CleanRecipe(Section):
    """What is done to the texts before training. Each row that is left out is written down with the reason."""

    deduplicate: Literal["exact", "near"] | None = None
    """Leave out examples that say the same as an earlier one, or nearly the same (four of five word triples)."""
    fix_encoding: bool = False
    """Mend texts that were decoded wrongly ("cafÃ©") and remove invisible characters."""
    min_characters: Annotated[int, Field(ge=1)] | None = None
    """Leave out examples whose answer, or text, is shorter."""
    max_characters: Annotated[int, Field(ge=1)] | None = None
    """Leave out examples whose answer, or text, is longer."""
    keep_matching: str | None = None
    """Leave out examples in which this regular expression is not found."""
    drop_matching: str | None = None
    """Leave out examples in which this regular expression is found."""

    @field_validator("keep_matching", "drop_matching")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return value


class DataRecipe(Section):
    """Which texts are trained, and how they become examples."""

    source: list[str] | None = None
    """Files (.txt, .md, .jsonl, .json, .csv, .tsv, .parquet, .arrow, .xlsx; also .gz, .bz2, .xz, .zst, in a .zip),
    folders or patterns of them, hf:NAME[CONFIG]:SPLIT, - for standard input, or `fables`, the texts that come with
    finespun. Several are put together, or mixed with weights: stories.jsonl:0.7 letters/*.txt:0.3."""
    validation: list[str] | Annotated[float, Field(ge=0, lt=1)] | None = None
    """Held-out texts: sources, or the share of the data to hold out [default: 0.1, about 200 of more than
    2,000 examples, or the set's own]."""
    group_by: str | None = None
    """Column of an author, a conversation or the like: what belongs to one is held out together."""
    format: Format | None = None
    """What the rows are [default: seen from their columns]."""
    columns: dict[str, str] | None = None
    """Own names of columns: --data.columns.prompt ask reads the column `ask` as `prompt`."""
    template: TemplateRecipe | None = None
    """Jinja templates over the columns of a row, in place of a format."""
    encoding: str | None = None
    """Encoding of text files [default: UTF-8, or found out]."""
    documents: Documents | None = None
    """What separates the documents of a .txt file [default: blank-lines if it has any, else lines]."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """What happens when rows cannot be used: nothing is trained, or they are left out and written down."""
    clean: CleanRecipe | None = None
    """What is done to the texts before training."""
    prompt_format: PromptFormat | None = None
    """Put prompts through the model's chat template, or take them as they are [default: chat if the model has a chat
    template and the data has prompts]."""
    chat_template: ChatTemplate | None = None
    """A template in place of the model's own: plain words, or ChatML with its two tokens, which the model then learns
    [default: the model's, or plain where it has none]."""
    train_on: TrainOn = "all"
    """Of a conversation, train all turns of the assistant or the last."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Longest example in tokens [default: the model's context, at most 2048]."""
    too_long: TooLong | None = None
    """What happens to a longer one: cut keeps its beginning, cut-left its end, skip leaves it out, split makes several
    of a text [default: split for texts, refuse for the rest]."""
    overlap: Annotated[int, Field(ge=0)] = 0
    """Tokens that the parts of a split text share as context."""

    @model_validator(mode="before")
    @classmethod
    def _source_alone(cls, value: Any) -> Any:
        """`data: stories.txt` is short for `data: {source: [stories.txt]}`."""
        if isinstance(value, str | Path):
            return {"source": [str(value)]}
        if isinstance(value, list | tuple):
            return {"source": [str(item) for item in value]}
        if isinstance(value, Mapping):
            value = dict(value)
            for key in ("source", "validation"):
                if isinstance(value.get(key), str | Path):
                    value[key] = [str(value[key])]
            match value.get("validation"):
                case [str(alone)] if alone.replace(".", "", 1).isdigit():  # a share, as the command line gives it
                    value["validation"] = float(alone)
        return value


class LoraRecipe(Section):
    """LoRA: low-rank updates beside frozen weights (Hu et al. 2021)."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale: the update is multiplied by alpha / rank."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get an update."""
    trained_modules: list[str] | None = None
    """Names of modules that are trained fully beside it, e.g. lm_head."""
    rank_stabilized: bool = False
    """rsLoRA: multiply by alpha / √rank, so that high ranks learn too (Kalajdzievski 2023)."""
    dora: bool = False
    """DoRA: train the length of each weight vector apart from its direction (Liu et al. 2024)."""
    initial: Literal["zero", "pissa"] = "zero"
    """The update starts at zero, or as the principal part of the weights themselves (PiSSA, Meng et al. 2024)."""
    b_rate_ratio: Annotated[float, Field(gt=0)] = 1.0
    """LoRA+: learning rate of the B matrices over that of the A matrices; 16 in the paper (Hayou et al. 2024)."""

    @model_validator(mode="after")
    def _one_decomposition(self) -> LoraRecipe:
        if self.dora and self.initial == "pissa":
            raise ValueError("`dora` and `initial` pissa take the weights apart in two ways; choose one")
        return self


class SoftPromptRecipe(Section):
    """Prompt tuning (Lester et al. 2021) and prefix tuning (Li & Liang 2021): the model stays, and vectors before its
    input, or before the keys and values of each layer, are trained."""

    virtual_tokens: Annotated[int, Field(ge=1)] = 20
    """How many of them."""
    initial_text: str | None = None
    """Prompt tuning starts from the embeddings of this text [default: of tokens drawn at random]."""


class TrainingRecipe(Section):
    """How the model learns."""

    method: Method = "full"
    """Train all weights, a LoRA adapter beside frozen ones (qlora: that are kept in 4 bits), or a soft prompt."""
    freeze: list[str] | None = None
    """What method full leaves as it is: embeddings, first-N (the first N layers), or patterns of parameter names such
    as *.mlp.*"""
    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the training examples."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many steps, whatever the epochs."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Take no more steps than fit into so many minutes on this machine, with their validations; the speed is measured
    first."""
    early_stopping: Annotated[int, Field(ge=1)] | None = None
    """Stop when so many validations in a row, or evaluations where evaluation.best_by is a metric, were no better than
    the best."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Examples in one step [default: 4 to 32, by the number of examples]."""
    optimizer: Optimizer = "adamw"
    """AdamW in float32 or with 8-bit moments, Adafactor, Muon (with AdamW for embeddings, head, norms and biases),
    Lion, or AdamW without a schedule."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak of the schedule [default: by method, optimizer and model size]."""
    schedule: Schedule | None = None
    """How the rate goes after the warm-up: down along a cosine or a line, constant, or constant with a final decay
    [default: cosine, or constant for schedule-free-adamw]."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps in which the rate rises to its peak."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps in which the rate falls, for schedule warmup-stable-decay."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decay of weight matrices; norms, biases and embeddings have none."""
    max_gradient_norm: Annotated[float, Field(gt=0)] = 1.0
    """Longer gradients are scaled down to this length."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """NEFTune: noise of this strength on the embeddings in training, e.g. 5 (Jain et al. 2023)."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Validate and keep a moving average of the weights, e.g. 0.999 of it and 0.001 of the new ones at each step."""
    validate_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between validations [default: ten in a run, or as many as take a tenth of its time]."""
    save_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints [default: at each validation]."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 1
    """How many of the newest checkpoints stay; the best one stays too."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Type of the weights in computation; masters are always float32 [default: the faster one here, measured]."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens computed at once: a matter of memory and speed, never of the result [default: the fastest here, measured
    once]."""
    gradient_checkpointing: Literal["off", "selective", "full"] = "off"
    """Keep less for the backward pass and compute it again there: all but the matrix products, or whole layers."""
    compile: bool = False
    """Compile norms and activations with torch.compile, which takes a minute at the start of a run."""
    memory_limit_gb: Annotated[float, Field(gt=0)] | None = None
    """Use no more memory than this [default: what the machine has]."""
    trackers: list[Tracker] | None = None
    """Also log to TensorBoard, Weights & Biases, MLflow or Trackio."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of order, noise and initial adapter weights."""

    @model_validator(mode="after")
    def _fits_together(self) -> TrainingRecipe:
        if self.optimizer == "schedule-free-adamw" and self.schedule not in (None, "constant"):
            raise ValueError("schedule-free-adamw needs no schedule: leave `schedule` out")
        if self.optimizer == "schedule-free-adamw" and self.ema_decay is not None:
            raise ValueError("schedule-free-adamw averages the weights itself: leave `ema_decay` out")
        if self.freeze and self.method != "full":
            raise ValueError(f"`freeze` is for method full; {self.method} leaves all of the model as it is")
        if self.gradient_checkpointing != "off" and self.method in ("prompt-tuning", "prefix-tuning"):
            # layers computed again would put the prompt's keys and values into the cache a second time
            raise ValueError(f"`gradient_checkpointing` does not go with {self.method}: leave it off")
        return self


class EvaluationRecipe(Section):
    """Metrics of `finespun evaluate` during training: every so many steps the model writes, greedily, for a sample of
    the held-out prompts."""

    every: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations; the last step has one too [default: none are made]."""
    examples: Annotated[int, Field(ge=1)] = 64
    """How many held-out prompts are in the sample, which is drawn once, with the seed; a prompt that stands there with
    several answers is one, and has them all as references."""
    metrics: list[str] | None = None
    """Names of metrics, or module:function for your own [default: those of `finespun evaluate` that fit the data, but
    for copied-4 and longest-copy]."""
    language: str | None = None
    """Language of the texts, such as en or zh [default: told from them]."""
    max_output_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest text that is written; `finespun evaluate` calls it --max-new-tokens."""
    best_by: str = VALIDATION_LOSS
    """What the best checkpoint, and early stopping, go by: validation_loss, or one of the metrics."""

    @field_validator("metrics", mode="after")
    @classmethod
    def _known(cls, value: list[str] | None) -> list[str] | None:
        """`--evaluation.metrics BLEU,chrF++` names two, in any case of letters."""
        if value is None:
            return None
        names = [_metric(name.strip()) for given in value for name in given.split(",") if name.strip()]
        if not names:
            raise ValueError("names no metric; leave it out for those that fit the data")
        return list(dict.fromkeys(names))

    @field_validator("best_by", mode="after")
    @classmethod
    def _known_too(cls, value: str) -> str:
        return value if value == VALIDATION_LOSS else _metric(value)

    @model_validator(mode="after")
    def _fits_together(self) -> EvaluationRecipe:
        by_metric = self.best_by != VALIDATION_LOSS
        if self.every is None and (self.metrics is not None or by_metric):
            raise ValueError("measures `metrics` every so many steps: say how many, with `every`")
        if by_metric and self.metrics is not None and self.best_by not in self.metrics:
            raise ValueError(f"`best_by` {self.best_by} is not one of the `metrics`: add it to them")
        return self


def _metric(name: str) -> str:
    """The name of a metric as evaluation writes it. Raises `ValueError` for one that is none."""
    before, colon, rest = name.partition(":")
    plain: dict[str, str] = {known.lower(): known for known in METRICS}
    with_model: dict[str, str] = {known.lower(): known for known in METRICS_WITH_A_MODEL}
    if not colon and name.lower() in plain:
        return plain[name.lower()]
    if colon and before and rest:  # with a model, or one's own
        return f"{with_model.get(before.lower(), before)}:{rest}"
    known = ", ".join([*METRICS, *(f"{each}:MODEL" for each in METRICS_WITH_A_MODEL)])
    raise ValueError(f"there is no metric {name!r}; there are {known}, and your own as module:function")


class SamplesRecipe(Section):
    """Texts written before and after training for the report."""

    count: Annotated[int, Field(ge=0)] = 3
    """How many held-out examples are written out."""
    prompts: list[str] | None = None
    """Own prompts instead of held-out ones."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest sample."""


class Recipe(Section):
    """A complete description of a run."""

    model: str = "smollm2-135m"
    """A known name, a hub id, a folder, or a .gguf file."""
    data: DataRecipe = Field(default_factory=DataRecipe)
    """The texts."""
    out: str | None = None
    """The run folder [default: runs/ and the name of the data]."""
    training: TrainingRecipe = Field(default_factory=TrainingRecipe)
    """How the model learns."""
    lora: LoraRecipe = Field(default_factory=LoraRecipe)
    """The adapter, for methods lora and qlora."""
    soft_prompt: SoftPromptRecipe = Field(default_factory=SoftPromptRecipe)
    """The vectors, for methods prompt-tuning and prefix-tuning."""
    evaluation: EvaluationRecipe = Field(default_factory=EvaluationRecipe)
    """Metrics during training."""
    samples: SamplesRecipe = Field(default_factory=SamplesRecipe)
    """Samples for the report."""

    @classmethod
    def parse(cls, *layers: Mapping[str, Any]) -> Recipe:
        """Recipe from nested mappings, a later one overriding an earlier one key by key.

        Raises `RecipeError` that names every wrong key or value and, for an unknown key, the nearest known one.
        """
        merged: dict[str, Any] = {}
        for layer in layers:
            _merge(merged, layer)
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise RecipeError(explain(error)) from None

    @classmethod
    def load(cls, path: str | Path, *overrides: Mapping[str, Any]) -> Recipe:
        """Recipe from a YAML file, with `overrides` on top. Raises `RecipeError`."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError(f"{path}: there is no such recipe. Check the name, or give --model and --data.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot be read as a recipe ({error}).") from None
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{path}: is not valid YAML: {error}") from None
        if content is None:
            content = {}
        if not isinstance(content, dict):
            raise RecipeError(
                f"{path}: a recipe is a YAML mapping of keys such as `model` and `data`, not "
                f"a {type(content).__name__}."
            )
        try:
            return cls.parse(content, *overrides)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None

    @classmethod
    def from_keywords(cls, **keywords: Any) -> Recipe:
        """Recipe from Python keywords: top-level keys, whole sections, or the bare name of a section's field
        (`epochs=3` is `training={"epochs": 3}`). Paths may be `Path` objects. Raises `RecipeError`."""
        nested: dict[str, Any] = {}
        for key, value in keywords.items():
            if key not in cls.model_fields and (home := FIELD_HOME.get(key)):
                _merge(nested, {home: {key: value}})
            else:
                _merge(nested, {key: value})
        return cls.parse(_paths_written_out(nested))

    def to_yaml(self) -> str:
        """The recipe as YAML that `load` reads back to an equal recipe."""
        content = self.model_dump(exclude_none=True)
        return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _paths_written_out(value: Any) -> Any:
    """`value` with the `Path` objects in it as YAML has them."""
    match value:
        case PurePath():
            return str(value)
        case dict():
            return {key: _paths_written_out(each) for key, each in value.items()}
        case list():
            return [_paths_written_out(each) for each in value]
    return value


class _Dumper(yaml.SafeDumper):
    """Quotes texts with U+0085, a line break in YAML 1.1, which PyYAML would write as it is and read as a space."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None),
)


SECTIONS: dict[str, type[Section]] = {
    "data": DataRecipe,
    "training": TrainingRecipe,
    "lora": LoraRecipe,
    "soft_prompt": SoftPromptRecipe,
    "evaluation": EvaluationRecipe,
    "samples": SamplesRecipe,
}

FIELD_HOME: dict[str, str] = {field: name for name, section in SECTIONS.items() for field in section.model_fields}
"""Section of each field that can be given by its bare name as a Python keyword."""


def known_keys() -> list[str]:
    """All keys a recipe can have, dotted."""
    return [*Recipe.model_fields, *(f"{section}.{field}" for field, section in FIELD_HOME.items())]


FREE_TO_CHANGE = {
    "out",
    "samples",
    "training.early_stopping",
    "training.keep_checkpoints",
    "training.memory_limit_gb",
    "training.micro_batch_tokens",
    "training.save_every",
    "training.trackers",
    "training.gradient_checkpointing",
    "training.compile",
}
"""What does not change the weights that a run arrives at, beyond rounding, or only where it ends."""


def changed_keys(before: Recipe, now: Recipe) -> list[str]:
    """What is different in two recipes and matters to a run that goes on, e.g. "training.epochs 3 → 5"."""
    old, new = _flat(before.model_dump(exclude_none=True)), _flat(now.model_dump(exclude_none=True))
    return [
        f"{key} {old.get(key, 'not set')} → {new.get(key, 'not set')}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and key not in FREE_TO_CHANGE and key.partition(".")[0] not in FREE_TO_CHANGE
    ]


def _flat(nested: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Dotted keys; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {before + key: value}
    return flat


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known dotted key most like `word`, as a whole or in its last part; None if none is like it."""

    def likeness(key: str) -> float:
        return max(fuzz.ratio(word, key), fuzz.ratio(word.rsplit(".", 1)[-1], key.rsplit(".", 1)[-1]))

    best = max(known, key=likeness)
    return best if likeness(best) >= 60 else None


def explain(error: ValidationError, known: Collection[str] | None = None) -> str:
    """What is wrong with a recipe, or with what has the keys `known`, one clause a fault, in these words instead of
    pydantic's."""
    parts = _KEY_PARTS if known is None else {part for key in known for part in key.split(".")}
    known = known_keys() if known is None else known
    faults: dict[str, str] = {}
    for fault in error.errors(include_url=False):
        unknown = fault["type"] == "extra_forbidden"
        # pydantic puts the branch of a union into the path; only the recipe's own keys are of use to a reader
        path = ".".join(str(part) for part in fault["loc"] if unknown or part in parts)
        if unknown:
            guess = nearest(path, known)
            hint = f"did you mean `{guess}`?" if guess else f"known are {', '.join(known)}."
            faults[path] = f"unknown key `{path}`; {hint}"
        else:
            given = "" if isinstance(fault["input"], dict) else f" (given: {fault['input']!r})"
            message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
            faults[path] = f"{faults[path]}, or {message}" if path in faults else f"`{path}` {message}{given}"
    return "; ".join(faults.values())


_KEY_PARTS = (
    {part for key in known_keys() for part in key.split(".")}
    | set(TemplateRecipe.model_fields)
    | set(CleanRecipe.model_fields)
)


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if key == "data" and not isinstance(value, Mapping):
            value = {"source": value}
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value
