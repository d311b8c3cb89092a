"""Examples → token ids and loss weights; prompts → token ids. The one place that decides which tokens are trained.

An example becomes pieces of text, each either context (weight 0) or trained (weight 1), and each piece is tokenized by
itself. So no token ever spans the boundary between a prompt and what is to be learned, and the ids of a prompt in
training are the ids of that prompt at generation: both come from `encode_prompt`'s path.

What a chat template does with a conversation is not assumed but looked at: it is rendered up to each assistant turn
and through it, and the difference must be the assistant's words and an end-of-turn token, or the example is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from finespun.data.formats import Example, Message, MessagesExample, PromptExample, Shape, TextExample
from finespun.data.sources import Origin, raise_all
from finespun.errors import DataError, FinespunError, ModelError

PromptFormat = Literal["chat", "raw"]
TooLong = Literal["refuse", "cut", "skip", "split"]

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ 'Assistant:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
"""For models that have no chat template: needs no token that the model does not know."""


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids of one example with a loss weight for each: 0 is context, 1 is trained. The first token has weight 0:
    nothing comes before it that could predict it."""

    input_ids: list[int]
    loss_weights: list[float]
    origin: Origin

    @property
    def trained_tokens(self) -> int:
        return sum(weight > 0 for weight in self.loss_weights)


@dataclass(frozen=True)
class _Piece:
    text: str
    trained: bool


class Encoder:
    """Turns examples and prompts into token ids for one tokenizer and one way of prompting.

    `prompt_format` "chat" puts prompts through the tokenizer's chat template, "raw" takes them as they are; the
    default is what the tokenizer can do. Raises `ModelError` for a tokenizer that has no end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat | None = None) -> None:
        self.tokenizer = tokenizer
        self.prompt_format: PromptFormat = prompt_format or ("chat" if tokenizer.chat_template else "raw")
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"The tokenizer of {tokenizer.name_or_path} has no end-of-sequence token, so a "
                "model cannot learn to stop."
            )
        # Sentence-piece tokenizers put a space before a text that stands alone; inside an example it must not be there.
        self._adds_space = self._decode(self._tokenize("\n") + self._tokenize("x")) != "\nx"
        self.stop_ids: tuple[int, ...] = self._find_stop_ids()

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Ids of what stands before the text that the model is to write: a raw prompt or a conversation."""
        if self.prompt_format == "raw":
            if not isinstance(prompt, str):
                raise DataError(
                    "This model continues texts and has no chat template: give it a text instead of messages."
                )
            ids = self._tokenize_start(prompt)
            # An empty prompt still needs one token to continue from.
            return ids or [
                self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
            ]
        messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
        pieces = list(self._turns(messages))
        done = sum(len(piece.text) for piece in pieces)
        pieces.append(_Piece(self._render(messages, add_generation_prompt=True)[done:], trained=False))
        ids: list[int] = []
        for piece in pieces:
            ids += self._tokenize_piece(piece, first=not ids)
        return ids

    def encode_example(self, example: Example) -> TokenizedExample:
        """Ids and loss weights of a training example. Raises `DataError` where what is trained cannot be verified."""
        match example:
            case TextExample(text):
                ids = self._tokenize_start(text)
                self._verify(ids, text, example.origin)
                return self._finish(ids, [1.0] * len(ids), example.origin)
            case PromptExample(prompt, completion) if self.prompt_format == "raw":
                context, trained = self.encode_prompt(prompt), self._tokenize_inside(completion)
                self._verify(trained, completion, example.origin)
                return self._finish(context + trained, [0.0] * len(context) + [1.0] * len(trained), example.origin)
            case PromptExample(prompt, completion):
                return self._encode_turns(
                    [Message(role="user", content=prompt), Message(role="assistant", content=completion)],
                    example.origin,
                )
            case MessagesExample(messages):
                return self._encode_turns(list(messages), example.origin)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text that `ids` add to what stands before them."""
        anchor = self._tokenize("\n") if self._adds_space else []
        text = self._decode([*anchor, *ids], skip_special_tokens)
        return text.removeprefix("\n") if anchor else text

    def _finish(self, ids: list[int], weights: list[float], origin: Origin) -> TokenizedExample:
        if ids[-1] != self.tokenizer.eos_token_id:
            ids, weights = [*ids, self.tokenizer.eos_token_id], [*weights, 1.0]
        return TokenizedExample(ids, [0.0, *weights[1:]], origin)

    def _encode_turns(self, messages: list[Message], origin: Origin) -> TokenizedExample:
        ids: list[int] = []
        weights: list[float] = []
        for piece in self._turns(messages, origin):
            new = self._tokenize_piece(piece, first=not ids)
            if piece.trained:
                self._verify(new, piece.text, origin)
            ids += new
            weights += [float(piece.trained)] * len(new)
        # What follows the last trained token (the line end after an end-of-turn token) teaches nothing.
        end = max(position for position, weight in enumerate(weights) if weight) + 1
        return TokenizedExample(ids[:end], weights[:end], origin)

    def _turns(self, messages: list[Message], origin: Origin | None = None) -> Iterator[_Piece]:
        """Pieces of a conversation through its last assistant turn: context, words and end of turn, rest, ..."""
        where = f"{origin}: " if origin else ""
        for message in messages:
            if inside := [token for token in self.tokenizer.all_special_tokens if token in message["content"]]:
                raise DataError(
                    f"{where}the {message['role']}'s words contain {inside[0]!r}, "
                    "which this model reads as the beginning or end of a turn; remove it."
                )
        done = ""
        for position, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:position], add_generation_prompt=True)
            after = self._render(messages[: position + 1])
            reply = after[len(before) :]
            words = next(
                (form for form in (message["content"], message["content"].strip()) if reply.startswith(form)), None
            )
            if not before.startswith(done) or not after.startswith(before) or words is None:
                raise DataError(
                    f"{where}the chat template of this model does not repeat message {position + 1} as "
                    "it was written, so it cannot "
                    "be shown which tokens are the assistant's. Use data.prompt_format raw, or another model."
                )
            end = self._end_of_turn(reply[len(words) :])
            yield _Piece(before[len(done) :], trained=False)
            yield _Piece(words + end, trained=True)
            done = before + words + end

    def _end_of_turn(self, tail: str) -> str:
        """The part of what a template puts behind an answer that ends it: up to its first special token."""
        found = [(tail.index(token), token) for token in self.tokenizer.all_special_tokens if token in tail]
        if not found:
            raise ModelError(
                "The chat template of this model ends an answer without a special token, so a "
                "model cannot learn to stop."
            )
        start, token = min(found)
        return tail[: start + len(token)]

    def _find_stop_ids(self) -> tuple[int, ...]:
        stop = [self.tokenizer.eos_token_id]
        if self.prompt_format == "chat":
            # a template that cannot be trained with may still do for writing, which then ends with EOS alone
            with contextlib.suppress(FinespunError):
                probe = list(self._turns([Message(role="user", content="a"), Message(role="assistant", content="b")]))
                stop.insert(0, self._tokenize(probe[-1].text)[-1])
        return tuple(dict.fromkeys(stop))

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        if not messages:
            return ""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": message["role"], "content": message["content"]} for message in messages],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    # Templates of reasoning models then put an empty thought before each answer, the same in a prompt
                    # as in an example; people's texts come without thoughts. Other templates do not know the word.
                    enable_thinking=False,
                )
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"The chat template of this model does not take a conversation of {roles}: {error}"
            ) from None

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tokenize_piece(self, piece: _Piece, first: bool) -> list[int]:
        return self._tokenize(piece.text) if first else self._tokenize_inside(piece.text)

    def _tokenize_start(self, text: str) -> list[int]:
        """Ids of a text that begins a sequence: with the tokenizer's own BOS, once, and without its EOS."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token_id
        if bos and text.startswith(bos):
            return self._tokenize(text)
        ids = list(self.tokenizer(text)["input_ids"])
        return ids[:-1] if len(ids) > len(self._tokenize(text)) and ids[-1] == eos else ids

    def _tokenize_inside(self, text: str) -> list[int]:
        """Ids of a text that goes on from another one."""
        if not self._adds_space:
            return self._tokenize(text)
        anchor = self._tokenize("\n")
        ids = self._tokenize("\n" + text)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else self._tokenize(text)

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens, clean_up_tokenization_spaces=False))

    def _verify(self, ids: Sequence[int], text: str, origin: Origin) -> None:
        """Refuses an example whose ids do not say what its text says (the normal form that the tokenizer gives a
        text is taken as the same)."""
        bos = self.tokenizer.bos_token or ""
        decoded = self._decode(ids)
        if text in (decoded, decoded.removeprefix(bos), self.decode(ids, skip_special_tokens=False)):
            return
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None and backend.normalizer is not None:
            expected = backend.normalizer.normalize_str(text).replace("\u2581", " ")
            if decoded.removeprefix(bos).strip() == expected.strip():
                return
        at = next(
            (i for i, (a, b) in enumerate(zip(decoded, text, strict=False)) if a != b), min(len(decoded), len(text))
        )
        raise DataError(
            f"{origin}: this model's tokenizer cannot write the text: {text[at : at + 20]!r} "
            f"becomes {decoded[at : at + 20]!r}. "
            "Use a model whose tokenizer knows these characters."
        )


def resolve_prompt_format(
    tokenizer: PreTrainedTokenizerBase, shape: Shape, wanted: PromptFormat | None
) -> PromptFormat:
    """How prompts are put, for data of `shape`; leaves the tokenizer's chat template as the record of it.

    A model that is trained on raw texts is no chat model any more: it loses its chat template, so that every program
    that loads it later prompts it as it was trained. A model without a template that is trained on messages gets
    `PLAIN_CHAT_TEMPLATE`. Raises `DataError` for messages with "raw".
    """
    if shape == "messages" and wanted == "raw":
        raise DataError("data.prompt_format raw does not go with messages: a conversation needs a chat template.")
    chosen: PromptFormat = wanted or (
        "chat" if shape == "messages" or (shape != "text" and tokenizer.chat_template) else "raw"
    )
    if shape == "text" and chosen == "chat":
        raise DataError("data.prompt_format chat does not go with plain texts, which have no prompt.")
    if chosen == "raw":
        tokenizer.chat_template = None
    elif not tokenizer.chat_template:
        starts_with_bos = (
            tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
        )
        tokenizer.chat_template = ("{{ bos_token }}" if starts_with_bos else "") + PLAIN_CHAT_TEMPLATE
    return chosen


@dataclass
class LengthReport:
    """What a length limit did."""

    longest: int = 0
    too_long: int = 0
    action: TooLong = "refuse"
    tokens_lost: int = 0


def fit_length(
    examples: Sequence[TokenizedExample], max_length: int, too_long: TooLong
) -> tuple[list[TokenizedExample], LengthReport]:
    """`examples` with none longer than `max_length` tokens, and what was done to get there.

    "cut" keeps the beginning, "skip" leaves the example out, "split" makes several of it that overlap by the one
    token which each needs as its first context, so that every token is still trained once. Raises `DataError` for
    "refuse", for a cut that leaves nothing to train, and where nothing is left at all.
    """
    report = LengthReport(longest=max((len(example.input_ids) for example in examples), default=0), action=too_long)
    kept: list[TokenizedExample] = []
    faults: list[str] = []
    for example in examples:
        length = len(example.input_ids)
        if length <= max_length:
            kept.append(example)
            continue
        report.too_long += 1
        if too_long == "refuse":
            faults.append(f"{example.origin}: {length} tokens, {length - max_length} more than {max_length}.")
        elif too_long == "skip":
            report.tokens_lost += length
        elif too_long == "cut":
            short = TokenizedExample(example.input_ids[:max_length], example.loss_weights[:max_length], example.origin)
            if short.trained_tokens:
                report.tokens_lost += length - max_length
                kept.append(short)
            else:
                faults.append(f"{example.origin}: a cut after {max_length} tokens would leave nothing to train.")
        else:
            kept.extend(_windows(example, max_length))
    if faults and too_long == "refuse":
        raise_all(
            [
                f"{report.too_long} of {len(examples)} examples are longer than data.max_length {max_length}; the "
                f"longest has {report.longest} tokens.",
                *faults,
            ],
            "Raise data.max_length if the model's context allows it, or choose data.too_long "
            "cut, skip or (texts only) split.",
        )
    raise_all(
        faults, "Raise data.max_length, shorten these prompts, or leave the examples out with data.too_long skip."
    )
    if not kept:
        raise DataError(
            f"All {len(examples)} examples are longer than data.max_length {max_length}, and "
            "data.too_long skip leaves none."
        )
    return kept, report


def _windows(example: TokenizedExample, size: int) -> Iterator[TokenizedExample]:
    ids, weights = example.input_ids, example.loss_weights
    for start in range(0, len(ids) - 1, size - 1):
        yield TokenizedExample(ids[start : start + size], [0.0, *weights[start + 1 : start + size]], example.origin)
