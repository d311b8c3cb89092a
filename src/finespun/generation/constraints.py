"""Continuations that have to look like something: JSON by a schema, a regular expression, a choice, a grammar. What may
come next is llguidance's to say (Earley's algorithm over bytes); here it becomes a mask over the vocabulary."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finespun.errors import GenerationError
from finespun.generation.settings import CONSTRAINTS, Sampling

_tokenizers: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, LLTokenizer] = weakref.WeakKeyDictionary()


class Constraint:
    """Where one continuation stands in what it has to look like."""

    def __init__(self, grammar: str, tokenizer: LLTokenizer, vocabulary: int) -> None:
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self._vocabulary = vocabulary
        if error := self._matcher.get_error():
            raise GenerationError(error)
        self.allowed()  # says whether there is any way to begin

    @property
    def must_end(self) -> bool:
        """Whether what has been written is complete and nothing can follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> torch.Tensor:
        """Which tokens may come next, `[vocab]`. Raises `GenerationError` where none may, or where the constraint is
        too large to be followed; llguidance itself would end the text there, as if it were complete."""
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            raise GenerationError(f"The text cannot go on in a way that it allows ({reason}).")
        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
        tokens = np.zeros(self._vocabulary, dtype=bool)
        tokens[: len(bits)] = bits[: self._vocabulary]
        return torch.from_numpy(tokens)

    def take(self, token: int) -> None:
        """`token` is written."""
        if not self._matcher.consume_token(token):
            raise GenerationError(f"The constraint could not be followed: {self._matcher.get_error()}")


def constraint_for(
    sampling: Sampling, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], vocabulary: int
) -> Constraint | None:
    """The constraint of `sampling`, if it has one, for a model with so many tokens. Raises `GenerationError` for a
    schema, expression or grammar that cannot be followed, with its place."""
    name = next((name for name in CONSTRAINTS if getattr(sampling, name) is not None), None)
    if name is None:
        return None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise GenerationError(f"{name}: this model's tokenizer is not one that constraints can be followed with.")
    if tokenizer not in _tokenizers:
        _tokenizers[tokenizer] = from_tokenizer(tokenizer, eos_token=list(stop_ids))
    try:
        return Constraint(_grammar(sampling), _tokenizers[tokenizer], vocabulary)
    except (GenerationError, ValueError) as error:
        raise GenerationError(f"{name}: {error}") from None


def _grammar(sampling: Sampling) -> str:
    if sampling.json_schema is not None:
        return LLMatcher.grammar_from_json_schema(json.dumps(sampling.json_schema))
    if sampling.choices is not None:
        return LLMatcher.grammar_from_regex("|".join(re.escape(choice) for choice in sampling.choices))
    if sampling.regex is not None:
        return LLMatcher.grammar_from_regex(sampling.regex)
    assert sampling.grammar is not None  # the only one left
    return LLMatcher.grammar_from_lark(sampling.grammar)
