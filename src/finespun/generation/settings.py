"""What a person can say about how a model writes. Light to import: the command line shows it in its help."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import Field, ValidationInfo, field_validator, model_validator

from finespun.recipe import Section

Penalty = Annotated[float, Field(ge=-2, le=2)]


class Sampling(Section):
    """Settings of one generation. With temperature 0 the most likely token is taken each time (greedy)."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest continuation, in tokens."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """A continuation does not end by itself before it has so many tokens."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """0 is greedy; 1 samples from the model's own distribution; lower is safer, higher more surprising."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Sample among the k most likely tokens only (Fan et al. 2018)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the most likely tokens that together have this probability (Holtzman et al. 2020)."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Sample among tokens at least this share as likely as the most likely one (Nguyen et al. 2024)."""
    typical_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the tokens whose surprise is nearest to the expected one, that together have this probability
    (Meister et al. 2023)."""
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Above 1, tokens that have occurred, in the prompt too, become less likely (Keskar et al. 2019)."""
    presence_penalty: Penalty = 0.0
    """Taken from the logit of each token that the continuation has already."""
    frequency_penalty: Penalty = 0.0
    """Taken from the logit of a token once for each time that the continuation has it."""
    no_repeat_ngram_size: Annotated[int, Field(ge=1)] | None = None
    """No sequence of so many tokens occurs twice, the prompt included."""
    # the command line knows no such dictionaries
    logit_bias: Annotated[dict[int, float], Parameter(parse=False)] = Field(default_factory=dict)
    """Added to the logits of these token ids."""
    stop: list[str] = Field(default_factory=list)
    """Texts at which a continuation ends; they are not part of it."""
    json_schema: dict[str, Any] | None = None
    """The continuation is a JSON text that follows this schema; {} allows any JSON."""
    regex: str | None = None
    """The continuation as a whole matches this regular expression (syntax of Rust's regex crate)."""
    choices: Annotated[list[str], Field(min_length=1)] | None = None
    """The continuation is one of these texts."""
    grammar: str | None = None
    """The continuation follows this context-free grammar, in the Lark syntax of llguidance."""
    best_of: Annotated[int, Field(ge=1)] = 1
    """So many are sampled for each that is given: the one whose tokens are likeliest on average."""
    beams: Annotated[int, Field(ge=1)] = 1
    """Above 1, beam search: so many beginnings are followed at once, and the likeliest whole text is given."""
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    """Beams are compared by log-probability / length ** this: above 0, longer texts are preferred."""
    beam_groups: Annotated[int, Field(ge=1)] = 1
    """Above 1, the beams are searched in so many groups, each of which avoids the tokens that the groups before it have
    just taken: diverse beam search (Vijayakumar et al. 2016)."""
    diversity_penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    """Taken from the log-probability of a token for each beam of earlier groups that has it in the same place; only
    with `beam_groups`."""
    contrastive_alpha: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Above 0, contrastive search (Su et al. 2022): of the `top_k` most likely tokens the one that is best by
    (1 - this) * probability - this * likeness to what is there already, by the cosine of the last hidden states."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Gives the log-probability of each token, and of so many of the likeliest ones in its place."""
    draft_tokens: Annotated[int, Field(ge=0)] = 0
    """So many tokens are guessed at once, by a draft model or, without one, from an earlier place where the last ones
    stood too, and verified in one pass: what is written does not change (Leviathan et al. 2023; Saxena 2023)."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the sampling; the n-th sample of a prompt draws by seed, n and prompt alone."""

    def changed(self, *names: str) -> list[str]:
        """Those of the settings `names` that are not as they are by default."""
        return [name for name in names if getattr(self, name) != getattr(Sampling(), name)]

    @model_validator(mode="after")
    def _one_constraint(self) -> Sampling:
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other")
        return self

    @field_validator("beam_groups")
    @classmethod
    def _even_groups(cls, groups: int, info: ValidationInfo) -> int:
        beams = info.data.get("beams", groups)
        if beams % groups:
            raise ValueError(f"should be a number that divides the number of beams, {beams}")
        return groups

    @field_validator("contrastive_alpha")
    @classmethod
    def _candidates(cls, alpha: float, info: ValidationInfo) -> float:
        if alpha and info.data.get("top_k", 1) is None:
            raise ValueError("needs `top_k`, the number of tokens to choose among: 4 for example")
        return alpha


CONSTRAINTS = ("json_schema", "regex", "choices", "grammar")
"""Settings that say what a continuation has to look like."""
