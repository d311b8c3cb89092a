"""A model as one of lm-eval's: asked as lm-eval asks those of `transformers`, answered by finespun's packed passes and
generation engine. Needs the package lm_eval; `finespun.evaluation.benchmarks` says so where it is missing.

What lm-eval lays down is kept: spaces at the end of a context belong to what follows it, a text without a context
stands behind BOS (EOS where there is none), what is too long loses its beginning, and a long text is read in windows.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from finespun.data.packing import micro_batches, pack
from finespun.data.readers import Origin
from finespun.data.templates import Encoder, TokenizedExample
from finespun.errors import DataError, RecipeError
from finespun.evaluation.evaluate import computed_by
from finespun.evaluation.kept import Kept, write_all
from finespun.evaluation.likelihood import MICRO_BATCH_TOKENS
from finespun.files import hash_of
from finespun.generation.settings import Sampling
from finespun.models.load import LoadedModel
from finespun.training.objectives.causal_lm import CausalLM
from finespun.training.progress import Reporter

Answer = tuple[float, bool]
"""The log-probability (nats) of a continuation, and whether each of its tokens is the likeliest in its place."""

SETTINGS = {"num_beams": "beams"} | {
    name: name
    for name in (
        "min_p",
        "no_repeat_ngram_size",
        "length_penalty",
        "repetition_penalty",
        "seed",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    )
}
"""What a task can say about generation, by the names of `transformers`, and what it is called here."""


class BenchmarkModel(TemplateLM):
    """`loaded`, whose weights have the hash `weights`, for lm-eval. What it computes is kept, request by request, so
    that an evaluation that was interrupted goes on. Raises `DataError` for a request that the model cannot read, and
    `RecipeError` for a setting of a task that it does not have."""

    tokenizer: PreTrainedTokenizerBase

    def __init__(self, loaded: LoadedModel, weights: str, reporter: Reporter) -> None:
        super().__init__()
        self.tokenizer = loaded.tokenizer
        self._device = loaded.device
        self._loaded, self._reporter = loaded, reporter
        self._encoder = Encoder(loaded.tokenizer)
        self._objective = CausalLM(loaded.model)
        self._weights = weights
        self._stderr = sys.stderr
        self._drops_space = _drops_space(self._encoder)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """The model's context in tokens."""
        return self._loaded.context_length

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of `string`, with what the tokenizer puts before a text unless that is there already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(str(self.tokenizer.decode([self.prefix_token_id])))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model reads; without its system message where the template has none."""

        def rendered(messages: list[dict[str, str]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        try:
            return rendered(chat_history)
        except jinja2.TemplateError:
            return rendered([message for message in chat_history if message["role"] != "system"])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability (nats) of each text, each of its tokens predicted once, from as much before it as its
        window holds."""
        asked = [
            [
                (("", ""), *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
                )
            ]
            for request in requests
        ]
        answers = iter(self._loglikelihood_tokens([window for windows in asked for window in windows]))
        return [sum(next(answers)[0] for _ in windows) for windows in asked]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[Answer]:
        kept = Kept("benchmarks", computed_by(self._loaded, self._encoder, self._weights))
        keys: list[str] = []
        todo: dict[tuple[int, ...], dict[tuple[int, ...], str]] = {}
        for (context, continuation), before, after in requests:
            if not 0 < len(after) <= self.max_length:
                raise DataError(
                    f"An answer to a benchmark's question has {len(after):,} tokens, and the model reads 1 to "
                    f"{self.max_length:,}: {continuation[:60]!r} behind {context[-60:]!r}"
                )
            read = tuple([*before, *after][-(self.max_length + 1) : -1])
            keys.append(hash_of([read, after]))
            if keys[-1] not in kept:
                todo.setdefault(read, {})[tuple(after)] = keys[-1]
        total = len(set(keys))
        with self._counting("Reading", "answers") as count:
            self._score(todo, kept, lambda left: count(total - left, total))
        return [(logprob, greedy) for logprob, greedy in (kept[key] for key in keys)]

    def _score(
        self, todo: Mapping[tuple[int, ...], Mapping[tuple[int, ...], str]], kept: Kept, on_left: Callable[[int], None]
    ) -> None:
        """Puts into `kept`, by their keys, the answers for the continuations that end, one token later, where what is
        read ends. What is read for several of them (the letters of a multiple choice) is read once."""
        nothing = np.zeros(0, dtype=np.float32)
        texts = list(todo)
        sequences = [
            TokenizedExample(np.array(ids, dtype=np.int32), np.resize(nothing, len(ids)), Origin("benchmark", number))
            for number, ids in enumerate(texts)
        ]
        left = sum(map(len, todo.values()))
        on_left(left)
        for group in micro_batches(sequences, MICRO_BATCH_TOKENS):
            asked = [todo[texts[sequence.origin.row]] for sequence in group]
            answers = self._answers(group, [list(each) for each in asked])
            for each, found in zip(asked, answers, strict=True):
                for key, answer in zip(each.values(), found, strict=True):
                    kept.add(key, answer)
                    left -= 1
            on_left(left)

    @torch.no_grad()
    def _answers(
        self, group: Sequence[TokenizedExample], asked: Sequence[Sequence[tuple[int, ...]]]
    ) -> list[list[Answer]]:
        """For each sequence of a packed row the answers for its continuations, whose last token comes behind it."""
        batch = pack(group).to(self._loaded.device)
        places: list[int] = []  # tokens of the row behind which something is predicted
        rows: list[int] = []  # of each predicted token: where it is among these
        targets: list[int] = []
        counts: list[int] = []
        for end, continuations in zip(batch.cu_seqlens[1:].tolist(), asked, strict=True):
            longest = max(map(len, continuations))
            places += range(end - longest, end)
            for continuation in continuations:
                rows += range(len(places) - len(continuation), len(places))
                targets += continuation
                counts.append(len(continuation))
        row, target = (torch.tensor(each, device=batch.input_ids.device) for each in (rows, targets))
        logprobs = torch.empty(len(rows), dtype=torch.float64, device=batch.input_ids.device)
        likeliest = torch.empty(len(rows), dtype=torch.bool, device=batch.input_ids.device)
        first = 0
        for logits in self._objective.logits(batch, torch.tensor(places, device=batch.input_ids.device)):
            here = ((row >= first) & (row < first + len(logits))).nonzero().squeeze(1)
            at = row[here] - first
            logprobs[here] = (logits[at, target[here]] - logits.logsumexp(-1)[at]).double()
            likeliest[here] = logits.argmax(-1)[at] == target[here]
            first += len(logits)
        parts = zip(logprobs.cpu().split(counts), likeliest.cpu().split(counts), strict=True)
        flat = iter([(float(sums.sum()), bool(equal.all())) for sums, equal in parts])
        return [[next(flat) for _ in continuations] for continuations in asked]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, as the task of the request says."""
        groups: dict[str, tuple[Sampling, dict[int, list[int]]]] = {}
        times: Counter[str] = Counter()
        for number, request in enumerate(requests):
            context, given = request.args
            sampling = sampling_of(given, str(request.task_name))
            if sampling.temperature > 0:  # a question that is asked several times gets other answers
                key = hash_of([context, given])
                sampling = sampling.model_copy(update={"seed": sampling.seed + times[key]})
                times[key] += 1
            room = self.max_length - sampling.max_new_tokens
            if room <= 0:
                raise RecipeError(
                    f"{request.task_name}: asks for up to {sampling.max_new_tokens:,} new tokens, and the model's "
                    f"context is {self.max_length:,}."
                )
            prompt = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
            groups.setdefault(sampling.model_dump_json(), (sampling, {}))[1][number] = prompt
        written: dict[int, str] = {}
        with self._counting("Writing", "answers") as count:
            for sampling, prompts in groups.values():
                already = len(written)
                encoder = self._stopping_at(sampling.stop)
                by = [computed_by(self._loaded, encoder, self._weights), sampling.model_dump(exclude_defaults=True)]
                completions = write_all(
                    *(self._loaded, encoder, list(prompts.values()), sampling, Kept("outputs", by)),
                    on_done=lambda done, already=already: count(already + done, len(requests)),
                )
                for number, completion in zip(prompts, completions, strict=True):
                    written[number] = completion.text
        texts = [written[number] for number in range(len(requests))]
        return [text.removeprefix(" ") for text in texts] if self._drops_space else texts

    def _stopping_at(self, stops: Sequence[str]) -> Encoder:
        """The encoder, for which special tokens among `stops` end a text; as text nobody would see them."""
        special = self.tokenizer.get_added_vocab()
        ids = [special[stop] for stop in stops if stop in special]
        encoder = copy.copy(self._encoder)
        encoder.stop_ids = tuple(dict.fromkeys([*encoder.stop_ids, *ids]))
        return encoder

    @contextlib.contextmanager
    def _counting(self, doing: str, what: str) -> Generator[Callable[[int, int], None]]:
        """As `Reporter.counting`, on the terminal that is kept from lm-eval's own bars and lines."""
        with contextlib.redirect_stderr(self._stderr), self._reporter.counting(doing, what) as count:
            yield count


def sampling_of(given: Mapping[str, Any], task: str) -> Sampling:
    """What a task says about generation as settings of ours. Raises `RecipeError` for what is not among them."""
    settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(given)))
    stop, most = settings.pop("until"), settings.pop("max_gen_toks")
    if settings.pop("do_sample"):
        settings.setdefault("temperature", 1.0)
    else:
        settings["temperature"] = 0.0
    settings["top_k"] = settings.get("top_k") or None
    unknown = [name for name in settings if name not in SETTINGS]
    if unknown:
        raise RecipeError(
            f"{task}: has the generation setting {', '.join(unknown)}, which finespun does not know; it knows "
            f"{', '.join(['until', 'max_gen_toks', 'do_sample', *SETTINGS])}."
        )
    named = {SETTINGS[name]: value for name, value in settings.items() if value is not None}
    return Sampling(stop=[text for text in stop if text], max_new_tokens=most, **named)


def _drops_space(encoder: Encoder) -> bool:
    """Whether the tokenizer leaves out the space with which a text begins, as those of sentence-piece do: lm-eval's
    metrics get the text without it."""
    ids = encoder.tokenizer.encode("x", add_special_tokens=False)
    return encoder.decode(ids, skip_special_tokens=False) == " x" and encoder.tokenizer.decode(ids) == "x"
