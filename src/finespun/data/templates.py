"""Examples → token ids and loss weights; prompts → token ids. The one place that decides which tokens are trained.

An example becomes sequences of pieces of text, each with its loss weight, and each piece is tokenized by itself. So no
token ever spans the boundary between a prompt and what is to be learned, and the ids of a prompt in training are the
ids of that prompt at generation: both come from the same pieces.

What a chat template does with a conversation is not assumed but looked at. It is rendered up to each assistant turn, as
it is at generation, and through it; the second text must begin with the first, and what it adds must be the assistant's
words and an end-of-turn token, or the example is refused. Where a template shows earlier turns otherwise once the
conversation has gone on (those of reasoning models drop old thoughts), a conversation becomes several sequences, each
of turns that are seen together at generation.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from finespun.data.formats import (
    Message,
    MessagesExample,
    PromptExample,
    Shape,
    TextExample,
    Tools,
    Trainable,
    words_of,
)
from finespun.data.readers import BadRow, Origin
from finespun.data.sources import raise_all
from finespun.errors import DataError, FinespunError, ModelError
from finespun.recipe import ChatTemplate, PromptFormat, TooLong, TrainOn

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User:\n' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' and not message.tool_calls %}"
    "{{ 'Assistant:\n' + message['content'] + eos_token + '\n\n' }}"
    "{% else %}{{ raise_exception('this template has no tools') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
"""For models that have no chat template: needs no token that the model does not know."""

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' or message.tool_calls %}"
    "{{ raise_exception('this template has no tools') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, as OpenAI introduced it: https://github.com/openai/openai-python/blob/v0.28.1/chatml.md"""

WORDS_REMEMBERED = 100_000

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

try:
    from transformers.utils.chat_template_utils import _compile_jinja_template
except ImportError:  # it is not part of what transformers promises
    _compile_jinja_template = None

_PLAIN_KEYS = {"role", "content"}

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Token ids `[tokens]` (int32) of one example with a loss weight for each (float32): 0 is context, 1 is trained.
    The first token has weight 0: nothing comes before it that could predict it."""

    input_ids: NDArray[np.int32]
    loss_weights: NDArray[np.float32]
    origin: Origin

    @property
    def trained_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_weights))


class _Piece(NamedTuple):
    text: str
    weight: float


class _Sequence(NamedTuple):
    """What becomes one `TokenizedExample`. `begins_text`: its first piece gets what the tokenizer puts before a text;
    `ends_text`: EOS comes behind its last."""

    pieces: list[_Piece]
    origin: Origin
    begins_text: bool = False
    ends_text: bool = False


class Encoder:
    """Turns examples and prompts into token ids for one tokenizer and one way of prompting.

    `prompt_format` "chat" puts prompts through the tokenizer's chat template, "raw" takes them as they are; the
    default is what the tokenizer can do. Of a conversation, `train_on` trains all of the assistant's turns or the last.
    Raises `ModelError` for a tokenizer that has no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_format: PromptFormat | None = None,
        train_on: TrainOn = "all",
    ) -> None:
        self.tokenizer = tokenizer
        self.prompt_format: PromptFormat = prompt_format or ("chat" if tokenizer.chat_template else "raw")
        self.train_on = train_on
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"The tokenizer of {tokenizer.name_or_path} has no end-of-sequence token, so a "
                "model cannot learn to stop."
            )
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))
        longest_first = sorted(self._special, key=len, reverse=True)
        self._any_special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # The Rust tokenizer itself works on batches in parallel and spares what transformers wraps around each text.
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            # What it remembers of words is too little for a large text; not part of what tokenizers promises.
            if resize := getattr(self._backend.model, "_resize_cache", None):
                resize(WORDS_REMEMBERED)
        # Sentence-piece tokenizers put a space before a text that stands alone; inside an example it must not be there.
        self._anchors: dict[str, list[int]] = {}
        self._template: tuple[Any, Any, dict[str, Any]] | None = None
        self._anchor = self._tokenize("\n")
        self._adds_space = self._decode(self._anchor + self._tokenize("x")) != "\nx"
        self._opening = self._find_opening()
        self.stop_ids: tuple[int, ...] = self._find_stop_ids()

    def encode_prompt(self, prompt: str | Sequence[Message], tools: Tools | None = None) -> list[int]:
        """Ids of what stands before the text that the model is to write: a raw prompt or a conversation. Raises
        `DataError` where the chat template does not take it, or leaves out a message or a tool."""
        if self.prompt_format == "raw":
            if not isinstance(prompt, str):
                raise DataError(
                    "This model continues texts and has no chat template: give it a text instead of messages."
                )
            sequence = _Sequence([_Piece(prompt, 0.0)], Origin("prompt", 1), begins_text=True)
        else:
            messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
            self._refuse_special(messages, tools)
            before = self._render(messages, tools, add_generation_prompt=True)
            _refuse_dropped(messages, tools, before)
            # The answers that stand in a prompt are tokenized as they were trained: apart from what is around them.
            pieces: list[_Piece] = []
            with contextlib.suppress(FinespunError):
                pieces = [_Piece(piece.text, 0.0) for piece in self._turns(messages, tools)[-1]]
            done = "".join(piece.text for piece in pieces)
            if not before.startswith(done):
                pieces, done = [], ""
            sequence = _Sequence([*pieces, _Piece(before[len(done) :], 0.0)], Origin("prompt", 1))
        (encoded,) = self.tokenize([sequence])
        assert isinstance(encoded, TokenizedExample)  # nothing in it is trained, so nothing can be wrong
        return encoded.input_ids.tolist()

    def encode_example(self, example: Trainable) -> list[TokenizedExample]:
        """Ids and loss weights of an example, in one sequence, or in several where its template shows earlier turns
        otherwise later. Raises `DataError` where what is trained cannot be verified."""
        sequences = self.sequences(example)
        if isinstance(sequences, BadRow):
            raise DataError(str(sequences))
        encoded = self.tokenize(sequences)
        raise_all([str(bad) for bad in encoded if isinstance(bad, BadRow)])
        return [tokens for tokens in encoded if isinstance(tokens, TokenizedExample)]

    def sequences(self, example: Trainable) -> list[_Sequence] | BadRow:
        """The pieces of an example, not yet tokenized, or why it cannot be trained."""
        origin = example.origin
        try:
            match example:
                case TextExample(text):
                    return [_Sequence([_Piece(text, 1.0)], origin, begins_text=True, ends_text=True)]
                case PromptExample(prompt, completion) if self.prompt_format == "raw":
                    pieces = [_Piece(prompt, 0.0), _Piece(completion, 1.0)]
                    return [_Sequence(pieces, origin, begins_text=True, ends_text=True)]
                case PromptExample(prompt, completion):
                    turns = [Message(role="user", content=prompt), Message(role="assistant", content=completion)]
                    return [_Sequence(pieces, origin) for pieces in self._trained_turns(turns, None)]
                case MessagesExample(messages, _, tools):
                    return [_Sequence(pieces, origin) for pieces in self._trained_turns(list(messages), tools)]
        except DataError as error:
            return BadRow(origin, str(error))

    def tokenize(self, sequences: Sequence[_Sequence]) -> list[TokenizedExample | BadRow]:
        """Each of `sequences` as ids and weights, or why its tokens do not say what it says."""
        anchors = [
            [
                self._anchor_of(sequence.pieces[number - 1].text) if number else ""
                for number in range(len(sequence.pieces))
            ]
            for sequence in sequences
        ]
        texts = [
            anchor + piece.text
            for sequence, before in zip(sequences, anchors, strict=True)
            for piece, anchor in zip(sequence.pieces, before, strict=True)
        ]
        different = list(
            dict.fromkeys(texts)
        )  # rows often share their prompts, and all share what a template opens with
        tokenized = dict(zip(different, self._tokenize_all(different), strict=True))
        ids = [
            [
                self._behind(anchor, tokenized[anchor + piece.text], piece.text)
                for piece, anchor in zip(sequence.pieces, before, strict=True)
            ]
            for sequence, before in zip(sequences, anchors, strict=True)
        ]
        trained = [
            (ids[row][number], piece.text)
            for row, sequence in enumerate(sequences)
            for number, piece in enumerate(sequence.pieces)
            if piece.weight
        ]
        verdicts = iter(self._verify([tokens for tokens, _ in trained], [text for _, text in trained]))
        return [self._assemble(sequence, parts, verdicts) for sequence, parts in zip(sequences, ids, strict=True)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text that `ids` add to what stands before them."""
        anchor = self._anchor if self._adds_space else []
        text = self._decode([*anchor, *ids], skip_special_tokens)
        return text.removeprefix("\n") if anchor else text

    def pieces(self, example: TokenizedExample) -> list[tuple[str, float]]:
        """An example's text, special tokens written out, in runs of equal loss weight, each with that weight. A first
        token that is part of a character, and has no loss since nothing predicts it, goes with the run behind it."""
        weights = example.loss_weights.copy()
        if len(weights) > 1 and "\ufffd" in self.decode(example.input_ids[:1].tolist(), skip_special_tokens=False):
            weights[0] = weights[1]
        ends = [*(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(weights)]
        return [
            (self.decode(example.input_ids[start:end].tolist(), skip_special_tokens=False), float(weights[start]))
            for start, end in zip([0, *ends], ends, strict=False)
        ]

    def _assemble(
        self, sequence: _Sequence, parts: list[list[int]], verdicts: Iterator[str | None]
    ) -> TokenizedExample | BadRow:
        faults = [next(verdicts) for piece in sequence.pieces if piece.weight]
        if fault := next(filter(None, faults), None):
            return BadRow(sequence.origin, fault)
        if sequence.begins_text:
            bos = self.tokenizer.bos_token
            if not (bos and sequence.pieces[0].text.startswith(bos)):
                parts[0] = [*self._opening, *parts[0]]
            if not parts[0] and not sequence.pieces[0].weight:
                parts[0] = self._nothing()
        ids = [token for part in parts for token in part]
        lengths = [len(part) for part in parts]
        weights = np.repeat(np.array([piece.weight for piece in sequence.pieces], dtype=np.float32), lengths)
        if sequence.ends_text and ids[-1] != self.tokenizer.eos_token_id:
            ids.append(self.tokenizer.eos_token_id)
            weights = np.append(weights, np.float32(sequence.pieces[-1].weight))
        if len(weights):
            weights[0] = 0.0
        return TokenizedExample(np.array(ids, dtype=np.int32), weights, sequence.origin)

    def _trained_turns(self, messages: list[Message], tools: Tools | None) -> list[list[_Piece]]:
        """The sequences of a conversation that hold something to train, each to its last trained piece."""
        self._refuse_special(messages, tools)
        sequences = self._turns(messages, tools)
        if self.train_on == "last":
            sequences = [[*(_Piece(piece.text, 0.0) for piece in sequences[-1][:-1]), sequences[-1][-1]]]
        kept = []
        for pieces in sequences:
            trained = [number for number, piece in enumerate(pieces) if piece.weight]
            if trained:
                kept.append(pieces[: trained[-1] + 1])
        if not kept:
            raise DataError(
                "the assistant's last message has the weight 0, so there is nothing to learn from this row."
            )
        return kept

    def _turns(self, messages: Sequence[Message], tools: Tools | None) -> list[list[_Piece]]:
        """A conversation through its last assistant turn in pieces: context, words with end of turn, context, ...;
        a new list begins where the template shows what was said before otherwise than when it was said."""
        sequences: list[list[_Piece]] = [[]]
        done = ""
        answers = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
        for position in answers:
            message = messages[position]
            before = self._render(messages[:position], tools, add_generation_prompt=True)
            after = self._render(messages[: position + 1], tools)
            words = self._answer(message, before, after[len(before) :]) if after.startswith(before) else None
            if words is None:
                raise DataError(
                    f"the chat template of this model does not repeat message {position + 1} as it was written, so it "
                    "cannot be shown which tokens are the assistant's"
                    + (" (it may know no tools)" if message.get("tool_calls") else "")
                    + (". It starts with the assistant, which not every template takes" if position == 0 else "")
                    + ". Use another data.chat_template, or another model."
                )
            if position == answers[-1]:
                _refuse_dropped(messages[:position], tools, before)
            if not before.startswith(done):
                sequences.append([])
                done = ""
            weight = float(message.get("weight", 1.0))
            sequences[-1] += [_Piece(before[len(done) :], 0.0), _Piece(words, weight)]
            done = before + words
        return sequences

    def _answer(self, message: Message, before: str, reply: str) -> str | None:
        """What the model has to write after `before`: the assistant's words and their end of turn, as `reply` renders
        them; None where it does not. Around them may be only white space, or an empty thought."""
        words = message["content"].strip()
        thought = message.get("reasoning_content")
        if match := _THOUGHT.fullmatch(message["content"]):
            thought, words = match[1], match[2].strip()
        opened = before.rstrip().endswith("<think>")
        parts = [words]
        if thought is not None:
            parts = [*([] if opened else ["<think>"]), thought.strip(), "</think>", words]
        end = _match(reply, parts)
        if thought is None and (not words or end is None):
            end = _match(reply, ["<think>", "</think>", words]) or end
        if calls := message.get("tool_calls"):
            return None if end is None else self._calls(calls, reply, end)
        if end is not None:
            ending = self._end_of_turn(reply[end:])
            return None if ending is None else reply[:end] + ending
        if thought is not None and (end := _match(reply, [words])) is not None:
            # The template drops thoughts at once, but the model must have written them to get there.
            ending = self._end_of_turn(reply[end:])
            opening = "" if opened else "<think>\n"
            return None if ending is None else f"{opening}{thought.strip()}\n</think>\n\n{words}{ending}"
        return None

    def _calls(self, calls: Sequence[dict[str, Any]], reply: str, end: int) -> str | None:
        """As `_answer`, for a message with tool calls, whose words end at `end`: all names and arguments come somewhere
        behind them."""
        start = end
        for leaf in _leaves([call["function"] for call in calls]):
            places = [(place, len(form)) for form in _forms(leaf) if (place := reply.find(form, start)) >= 0]
            if not places:
                return None
            end = max(end, sum(min(places)))
        tail = reply[end:]
        known = self._ending
        if known and known in tail:
            return reply[:end] + tail[: tail.index(known) + len(known)]
        last = max((tail.rindex(token) + len(token) for token in self._special if token in tail), default=None)
        return None if last is None else reply[:end] + tail[:last]

    def _end_of_turn(self, tail: str) -> str | None:
        """The part of what a template puts behind an answer that ends it: its first special token; None if something
        else comes before it."""
        found = [(tail.index(token), -len(token), token) for token in self._special if token in tail]
        if not found:
            raise ModelError(
                "The chat template of this model ends an answer without a special token, so a "
                "model cannot learn to stop."
            )
        start, _, token = min(found)
        return None if tail[:start].strip() else tail[: start + len(token)]

    def _find_stop_ids(self) -> tuple[int, ...]:
        stop = [self.tokenizer.eos_token_id]
        self._ending: str | None = None
        if self.prompt_format == "chat":
            # a template that cannot be trained with may still do for writing, which then ends with EOS alone
            with contextlib.suppress(FinespunError):
                asked = [Message(role="user", content="a"), Message(role="assistant", content="b")]
                ids = self._tokenize(self._turns(asked, None)[-1][-1].text)
                stop.insert(0, ids[-1])
                self._ending = self._decode(ids[-1:])
        return tuple(dict.fromkeys(stop))

    def _refuse_special(self, messages: Sequence[Message], tools: Tools | None) -> None:
        """Words that a model reads as the beginning or end of a turn would train it on turns that nobody took."""
        said = [
            (f"the {message['role']}'s words contain", text) for message in messages for text in words_of([message])
        ]
        for where, text in [*said, *([("the tools contain", json.dumps(tools, ensure_ascii=False))] if tools else [])]:
            if inside := self._any_special.search(text):
                raise DataError(
                    f"{where} {inside[0]!r}, which this model reads as the beginning or end of a turn; remove it."
                )

    def _render(self, messages: Sequence[Message], tools: Tools | None, add_generation_prompt: bool = False) -> str:
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        try:
            return self._rendered(plain, tools, add_generation_prompt)
        except Exception as error:  # a template can raise anything that the expressions in it can
            roles = ", ".join(message["role"] for message in messages) or "nobody"
            raise DataError(
                f"the chat template of this model does not take a conversation of {roles}: {error}"
            ) from None

    def _rendered(self, messages: list[dict[str, Any]], tools: Tools | None, add_generation_prompt: bool) -> str:
        if _compile_jinja_template is None or tools or any(message.keys() != _PLAIN_KEYS for message in messages):
            # in a list, since an empty conversation alone is refused
            return str(
                self.tokenizer.apply_chat_template(
                    [messages],
                    tools=tools,  # ty: ignore[invalid-argument-type]
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )[0]
            )
        # The same without what is done around it for each conversation, which takes longer than the template itself.
        chat_template = self.tokenizer.chat_template
        if self._template is None or self._template[0] is not chat_template:
            compiled = _compile_jinja_template(self.tokenizer.get_chat_template())
            self._template = chat_template, compiled, {**compiled.globals, **self.tokenizer.special_tokens_map}
        _, compiled, known = self._template
        said = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        return "".join(compiled.root_render_func(compiled.new_context(known | said, shared=True)))

    def _nothing(self) -> list[int]:
        """An empty prompt still needs one token to continue from."""
        tokenizer = self.tokenizer
        return [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]

    def _tokenize_all(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text by itself, without BOS and EOS."""
        if self._backend is not None:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

    def _tokenize(self, text: str) -> list[int]:
        return self._tokenize_all([text])[0]

    def _anchor_of(self, before: str) -> str:
        """What a piece is tokenized behind, so that it gets the ids it has inside the whole text: the special token in
        front of it, which may swallow white space, or a line end where a text alone would get a space."""
        special = max((token for token in self._special if before.endswith(token)), key=len, default="")
        return special or ("\n" if self._adds_space else "")

    def _behind(self, anchor: str, ids: list[int], text: str) -> list[int]:
        """Ids of `text` out of those of `anchor` and `text` together."""
        if not anchor:
            return ids
        known = self._anchors.get(anchor)
        if known is None:
            known = self._anchors[anchor] = self._tokenize(anchor)
        return ids[len(known) :] if ids[: len(known)] == known else self._tokenize(text)

    def _find_opening(self) -> list[int]:
        """What the tokenizer puts before a text: its BOS, or nothing."""
        bare, whole = self._tokenize("x"), list(self.tokenizer("x")["input_ids"])
        return next((whole[:at] for at in range(len(whole)) if whole[at : at + len(bare)] == bare), [])

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens, clean_up_tokenization_spaces=False))

    def _verify(self, ids: Sequence[list[int]], texts: Sequence[str]) -> list[str | None]:
        """For each text whether its ids say what it says: None, or how they differ."""
        if self._backend is not None:
            decoded = self._backend.decode_batch(list(ids), skip_special_tokens=False)
        else:
            decoded = [self._decode(each) for each in ids]
        return [
            None if said == text else self._difference(each, said, text)
            for each, said, text in zip(ids, decoded, texts, strict=True)
        ]

    def _difference(self, ids: list[int], decoded: str, text: str) -> str | None:
        """The normal form that the tokenizer gives a text is taken as the same."""
        bos = self.tokenizer.bos_token or ""
        if text in (decoded.removeprefix(bos), self.decode(ids, skip_special_tokens=False)):
            return None
        if self._backend is not None and self._backend.normalizer is not None:
            expected = self._backend.normalizer.normalize_str(text).replace("\u2581", " ")
            if decoded.removeprefix(bos).strip() == expected.strip():
                return None
        at = next(
            (i for i, (a, b) in enumerate(zip(decoded, text, strict=False)) if a != b), min(len(decoded), len(text))
        )
        return (
            f"this model's tokenizer cannot write the text: {text[at : at + 20]!r} becomes {decoded[at : at + 20]!r}. "
            "Use a model whose tokenizer knows these characters."
        )


def _match(reply: str, parts: Sequence[str]) -> int | None:
    """Where `parts` end in `reply`, if it begins with them, in order and with nothing but white space between."""
    end = 0
    for part in parts:
        space = len(reply) - len(reply[end:].lstrip())
        if not part:
            continue
        if not reply.startswith(part, space):
            return None
        end = space + len(part)
    return end


def _leaves(value: Any) -> Iterator[Any]:
    """All keys of arguments, and all values, of tool calls."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in ("name", "arguments"):
                yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _forms(leaf: Any) -> Iterator[str]:
    """How a template may write a value, the most likely first."""
    if isinstance(leaf, str):
        yield leaf
        yield json.dumps(leaf, ensure_ascii=False)[1:-1]
        yield json.dumps(leaf)[1:-1]
    else:
        yield json.dumps(leaf)
        yield str(leaf)


def _refuse_dropped(messages: Sequence[Message], tools: Tools | None, rendered: str) -> None:
    """Raises `DataError` for a message or a tool that a template leaves out. Only the system's words may move: some
    templates put them before the last question."""
    place = 0
    for number, message in enumerate(messages, 1):
        words = message["content"].strip()
        if message["role"] == "assistant" or not words:
            continue
        start = 0 if message["role"] == "system" else place
        found = next(((at, len(form)) for form in _forms(words) if (at := rendered.find(form, start)) >= 0), None)
        if not found and message["role"] == "tool":
            with contextlib.suppress(ValueError):
                if all(any(form in rendered for form in _forms(leaf)) for leaf in _leaves(json.loads(words))):
                    continue
        if not found:
            raise DataError(
                f"the chat template of this model leaves out message {number}, the {message['role']}'s, or changes it. "
                "Use another data.chat_template, or another model."
            )
        if message["role"] != "system":
            assert found is not None
            place = sum(found)
    for tool in tools or []:
        name = tool["function"].get("name")
        if not isinstance(name, str) or name not in rendered:
            raise DataError(
                f"the chat template of this model does not show the tool {name!r}: it knows no tools. Use a model "
                "whose template does, or remove the tools."
            )


def resolve_prompt_format(
    tokenizer: PreTrainedTokenizerBase,
    shape: Shape,
    wanted: PromptFormat | None,
    chat_template: ChatTemplate | None = None,
    thoughts: bool = False,
) -> PromptFormat:
    """How prompts are put, for data of `shape`; leaves the tokenizer's chat template as the record of it.

    A model that is trained on raw texts is no chat model any more: it loses its chat template, so that every program
    that loads it later prompts it as it was trained. A model without a template that is trained on messages gets the
    plain one; `chat_template` gives it this one or ChatML in place of its own. ChatML's tokens are added to the
    vocabulary where they are missing, and the model has to grow with it. A template that lets a model think or not is
    fixed to what the data does. Raises `DataError` for messages with "raw".
    """
    if shape == "messages" and wanted == "raw":
        raise DataError("data.prompt_format raw does not go with messages: a conversation needs a chat template.")
    if chat_template and (wanted == "raw" or shape == "text"):
        raise DataError(f"data.chat_template {chat_template} does not go with raw texts.")
    chosen: PromptFormat = wanted or (
        "chat" if shape == "messages" or chat_template or (shape != "text" and tokenizer.chat_template) else "raw"
    )
    if shape == "text" and chosen == "chat":
        raise DataError("data.prompt_format chat does not go with plain texts, which have no prompt.")
    if chosen == "raw":
        tokenizer.chat_template = None
    elif chat_template or not tokenizer.chat_template:
        starts_with_bos = (
            tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
        )
        if chat_template == "chatml":
            tokenizer.add_tokens(list(CHATML_TOKENS), special_tokens=True)
        template = CHATML_TEMPLATE if chat_template == "chatml" else PLAIN_CHAT_TEMPLATE
        tokenizer.chat_template = ("{{ bos_token }}" if starts_with_bos else "") + template
    elif isinstance(tokenizer.chat_template, str) and "enable_thinking" in tokenizer.chat_template:
        choice = f"{{%- set enable_thinking = {'true' if thoughts else 'false'} %}}"
        if not tokenizer.chat_template.startswith("{%- set enable_thinking"):
            tokenizer.chat_template = choice + tokenizer.chat_template
    return chosen


@dataclass
class LengthLimit:
    """The longest example, what happens to longer ones, and a count of what did.

    "cut" keeps the beginning of an example, "cut-left" its end, "skip" leaves it out, "split" makes several of it that
    overlap by `overlap` tokens, at least the one that each needs as its first context; the overlap is context, so that
    every token is trained once. "refuse" refuses it.
    """

    max_length: int
    too_long: TooLong
    overlap: int = 0
    longest: int = 0
    count: int = 0
    tokens_lost: int = 0

    def fit(self, example: TokenizedExample) -> list[TokenizedExample] | BadRow:
        """What is left of `example`: itself, a part, several, or none."""
        length, limit = len(example.input_ids), self.max_length
        self.longest = max(self.longest, length)
        if length <= limit:
            return [example]
        self.count += 1
        if self.too_long == "refuse":
            return BadRow(example.origin, f"{length} tokens, {length - limit} more than {limit}.")
        if self.too_long == "skip":
            self.tokens_lost += length
            return []
        if self.too_long == "split":
            return list(self._windows(example))
        kept = slice(None, limit) if self.too_long == "cut" else slice(length - limit, None)
        part = self._part(example, kept, 1)
        if not part.trained_tokens:
            return BadRow(example.origin, f"a cut to {limit} tokens would leave nothing to train.")
        self.tokens_lost += length - limit
        return [part]

    def _windows(self, example: TokenizedExample) -> Iterator[TokenizedExample]:
        length, known = len(example.input_ids), max(1, self.overlap)
        for start in range(0, length - known, self.max_length - known):
            window = self._part(example, slice(start, start + self.max_length), known if start else 1)
            if window.trained_tokens:
                yield window

    @staticmethod
    def _part(example: TokenizedExample, kept: slice, context: int) -> TokenizedExample:
        weights = example.loss_weights[kept].copy()
        weights[:context] = 0.0
        return TokenizedExample(example.input_ids[kept], weights, example.origin)
