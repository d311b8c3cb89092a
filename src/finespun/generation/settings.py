"""What a person can say about how a model writes. Light to import: the command line shows it in its help."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finespun.recipe import Section


class Sampling(Section):
    """Settings of one generation. With temperature 0 the most likely token is taken each time (greedy)."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest continuation, in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy; 1 samples from the model's own distribution; lower is safer, higher more surprising."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Sample among the k most likely tokens only (Fan et al. 2018)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the most likely tokens that together have this probability (Holtzman et al. 2020)."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Sample among tokens at least this share as likely as the most likely one (Nguyen et al. 2024)."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1, tokens that have occurred become less likely (Keskar et al. 2019)."""
    stop: list[str] = Field(default_factory=list)
    """Texts at which a continuation ends; they are not part of it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the sampling; the n-th sample of any prompt draws from its own stream of it."""
