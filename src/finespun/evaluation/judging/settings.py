"""What a person can say about a study and about its server. Light to import: the command line shows it in its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from finespun.recipe import Section

Method = Literal["pairs", "ranking", "rating"]


class StudySettings(Section):
    """How outputs are judged. It is fixed when a study begins."""

    method: Method = "pairs"
    """What people do: choose between two texts (tie and "both are bad" are answers too), order all texts for a prompt
    from best to worst, or rate one text at a time by criteria."""
    annotators: Annotated[int, Field(ge=1, le=200)] = 1
    """People who judge; each gets a personal link."""
    overlap: Annotated[int, Field(ge=1)] = 2
    """Annotators who judge the same item, so that their agreement can be measured; all where there are fewer."""
    examples: Annotated[int, Field(ge=1)] | None = None
    """Examples that are judged, drawn at random; all by default."""
    criteria: list[str] = Field(default_factory=list)
    """What texts are rated by: of fluency, adequacy, coherence, style and those in --criteria-file; by default those in
    the file, or the four."""
    criteria_file: Path | None = None
    """A YAML file with other criteria: for each name a `question`, and `points` from worst to best."""
    instructions: Path | None = None
    """A text file that people read before they begin; by default a short explanation of the method."""
    known_items: Path | None = None
    """A .jsonl file of items with a known answer (`prompt`, `better`, `worse`, and `why` for practice); by default they
    are made: a text beside the same text with its words in random order."""
    practice: Annotated[int, Field(ge=0)] = 2
    """Items with a known answer at the beginning, which are explained and do not count."""
    known: Annotated[int, Field(ge=0)] = 2
    """Items with a known answer among the others, for each annotator: a check of attention."""
    repeated: Annotated[int, Field(ge=0)] = 2
    """Items that come a second time with their sides changed, for each annotator: a check of consistency."""
    seed: int = 0
    """Of everything that is drawn at random."""


class JudgeServerSettings(Section):
    """Where the pages of a study are served."""

    host: str = "127.0.0.1"
    """Address to listen at: this machine's own, or 0.0.0.0 for all who can reach it. Whoever has a link can judge;
    outside a network that is trusted, put a server with TLS before it."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen at; 0 takes a free one."""
    url: str | None = None
    """Where people reach the server, where that is another address (https://judge.example.org); links begin with it."""
