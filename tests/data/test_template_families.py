"""What is trained under the chat templates of many model families, checked against the templates themselves.

What an example should be is computed here from the template and the family's description alone: before each answer
stands the prompt that the model would get at generation, and trained are the answer's words and the token that ends
it. The templates lie in `chat_templates/`, which says where each comes from and what is peculiar about it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from conftest import sentences
from finespun.data.formats import Message, MessagesExample, PromptExample
from finespun.data.readers import Origin
from finespun.data.templates import Encoder, TokenizedExample, resolve_prompt_format
from finespun.errors import DataError

TEMPLATES = Path(__file__).parent / "chat_templates"
HERE = Origin("f.jsonl", 3)
NAMED = r"f\.jsonl, row 3"


def as_written(words: str) -> str:
    return words


@dataclass(frozen=True)
class Family:
    """A model family's tokens and what its template does with the assistant's words."""

    end: str
    """The token that ends an answer."""
    special: tuple[str, ...] = ()
    """Special tokens beside BOS and EOS."""
    plain: tuple[str, ...] = ()
    """Tokens of their own that are not special: text may contain them."""
    bos: str | None = None
    eos: str = ""
    listed: bool = False
    """Whether the tokenizer's settings name the special tokens, as some do; the others only mark them as special."""
    adds_bos: bool = False
    """Whether the tokenizer puts a BOS before every text."""
    swallows: bool = False
    """Whether the special tokens swallow the whitespace behind them."""
    tiktoken: bool = False
    """Whether texts are cut before merging as tiktoken's vocabularies are, in which line ends stay together."""
    words: Callable[[str], str] = as_written
    """What the template makes of an answer's words."""
    before: str = ""
    after: str = ""
    """What it puts round them, between the prompt and the end of the turn."""
    system: bool = True
    alternates: bool = False
    """Whether user and assistant must take turns."""
    tools: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All special tokens."""
        return tuple(dict.fromkeys(token for token in (self.bos, self.eos, self.end, *self.special) if token))


CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
MISTRAL_TOKENS = (
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
DEEPSEEK = Family(
    end="<｜end▁of▁sentence｜>",
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    adds_bos=True,
    tiktoken=True,
    plain=(
        "<｜User｜>",
        "<｜Assistant｜>",
        *(f"<｜tool▁{part}｜>" for part in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")),
        *(f"<｜tool▁{part}｜>" for part in ("outputs▁begin", "outputs▁end", "output▁begin", "output▁end")),
        "<think>",
        "</think>",
    ),
)
QWEN = Family(
    end="<|im_end|>",
    special=(*CHATML_TOKENS, "<|endoftext|>"),
    plain=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    eos="<|im_end|>",
    listed=True,
    tiktoken=True,
    words=lambda words: words.lstrip("\n"),
    before="<think>\n\n</think>\n\n",
    tools=True,
)
GEMMA = Family(
    end="<end_of_turn>",
    special=("<start_of_turn>", "<end_of_turn>"),
    bos="<bos>",
    eos="<eos>",
    listed=True,
    adds_bos=True,
    words=str.strip,
    alternates=True,
)

FAMILIES: dict[str, Family] = {
    # `qwen3+` is Qwen 3 whose template was fixed to think nothing, as it is for data without thoughts
    "chatml": Family(end="<|im_end|>", special=CHATML_TOKENS, bos="<|im_start|>", eos="<|im_end|>", listed=True),
    "llama-3.1": Family(
        end="<|eot_id|>",
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>", "<|end_of_text|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        adds_bos=True,
        tiktoken=True,
        words=str.strip,
        tools=True,
    ),
    "llama-2": Family(
        end="</s>", bos="<s>", eos="</s>", adds_bos=True, words=str.strip, before=" ", after=" ", alternates=True
    ),
    "mistral-v1": Family(end="</s>", bos="<s>", eos="</s>", adds_bos=True, before=" ", alternates=True),
    "mistral-v3": Family(
        end="</s>",
        special=MISTRAL_TOKENS,
        bos="<s>",
        eos="</s>",
        adds_bos=True,
        words=str.strip,
        before=" ",
        alternates=True,
        tools=True,
    ),
    "mistral-nemo": Family(
        end="</s>",
        special=MISTRAL_TOKENS,
        bos="<s>",
        eos="</s>",
        adds_bos=True,
        tiktoken=True,
        alternates=True,
        tools=True,
    ),
    "gemma-2": Family(**{**vars(GEMMA), "system": False}),
    "gemma-3": GEMMA,
    "qwen3": QWEN,
    "qwen3+": Family(**{**vars(QWEN), "before": ""}),
    "qwen3-thinking": Family(**{**vars(QWEN), "before": "\n</think>\n\n"}),
    "phi-3": Family(
        end="<|end|>",
        special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        bos="<s>",
        eos="<|endoftext|>",
        swallows=True,
    ),
    "phi-4": Family(
        end="<|im_end|>",
        special=(*CHATML_TOKENS, "<|im_sep|>"),
        bos="<|endoftext|>",
        eos="<|im_end|>",
        tiktoken=True,
    ),
    "zephyr": Family(end="</s>", bos="<s>", eos="</s>", adds_bos=True),
    "deepseek-v3": DEEPSEEK,
    "deepseek-r1": DEEPSEEK,
    "deepseek-r1-first": DEEPSEEK,
    "command-r": Family(
        end="<|END_OF_TURN_TOKEN|>",
        special=("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        adds_bos=True,
        words=str.strip,
        alternates=True,
    ),
    "granite-3.0": Family(
        end="<|end_of_text|>",
        special=("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        listed=True,
    ),
}
HOSTILE = ("reorders", "drops", "rewrites")
FORGETS_SYSTEM = ("mistral-v3", "mistral-nemo")
"""Their templates show the system message before an answer and no longer behind it."""
OPENS_THOUGHT = ("deepseek-r1", "qwen3-thinking")
"""Their prompts open a thought. Every answer of the second has one, and no answer that the first shows."""
TRAINABLE = tuple(name for name in FAMILIES if name not in OPENS_THOUGHT)
WITH_TOOLS = tuple(name for name in TRAINABLE if FAMILIES[name].tools)
WITHOUT_TOOLS = tuple(name for name, family in FAMILIES.items() if not family.tools)

TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

WORDS = (
    "The ferryman.",
    "独钓寒江雪",
    "He rows 🙂 é.\n\nAnd rows.",
    "user",
    "  between two banks \n",
    "assistant",
    "model\n",
    "\n\nsystem",
    "<|assistant|>\nNo.",
    "[/INST] No.",
)

DEPTH = {
    "type": "function",
    "function": {
        "name": "depth",
        "description": "How deep a river is.",
        "parameters": {"type": "object", "properties": {"river": {"type": "string"}}, "required": ["river"]},
    },
}


@cache
def byte_level_tokenizer(tiktoken: bool) -> str:
    """A tokenizer of 600 tokens that knows line ends, spaces and the words of templates well, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(TIKTOKEN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        if tiktoken
        else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    marks = ["<|user|>\n\n", "<|assistant|>\n", "[INST] the [/INST] user", "assistant\n\n", "model\n", "  \n\n\n"]
    tokenizer.train_from_iterator([*sentences(100), *marks * 50], trainer)
    return tokenizer.to_str()


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A small tokenizer with the tokens, the settings and the template of a family."""
    family = FAMILIES.get(name, FAMILIES["chatml"])
    backend = Tokenizer.from_str(byte_level_tokenizer(family.tiktoken))
    named = [token for token in (family.bos, family.eos) if token]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in named])
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, rstrip=family.swallows)
            for token in family.names
            if token not in named
        ]
    )
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.plain])
    if family.adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, backend.token_to_id(family.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        extra_special_tokens=list(family.special) if family.listed else [],
    )
    tokenizer.chat_template = (TEMPLATES / f"{name.removesuffix('+')}.jinja").read_text(encoding="utf-8")
    if name.endswith("+"):
        assert resolve_prompt_format(tokenizer, "messages", None) == "chat"
    return tokenizer


@cache
def encoder_of(name: str) -> Encoder:
    return Encoder(tokenizer_of(name))


def rendered(name: str, messages: Sequence[Message], prompt: bool, tools: Any = None) -> str:
    conversation = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    [text] = tokenizer_of(name).apply_chat_template(
        [conversation],  # in a list, since an empty conversation alone is refused
        tools=tools,
        add_generation_prompt=prompt,
        tokenize=False,
    )
    return str(text)


def tokenized(name: str, text: str) -> list[int]:
    return list(tokenizer_of(name)(text, add_special_tokens=False)["input_ids"])


def decoded(name: str, ids: Sequence[int]) -> str:
    return str(tokenizer_of(name).decode([int(i) for i in ids], clean_up_tokenization_spaces=False))


def context_of(name: str, messages: Sequence[Message]) -> str:
    """The prompt after `messages`, as its tokens say it."""
    text = rendered(name, messages, prompt=True)
    if not FAMILIES[name].swallows:
        assert decoded(name, tokenized(name, text)) == text
        return text
    # Tokens that swallow whitespace leave only that of the answers, which the model wrote as tokens of its own.
    mark = "\ue000"
    marked = [
        {**message, "content": mark + message["content"]} if message["role"] == "assistant" else message
        for message in messages
    ]
    return decoded(name, tokenized(name, rendered(name, marked, prompt=True))).replace(mark, "")


def trained_spans(example: TokenizedExample) -> Iterator[tuple[int, int]]:
    """Beginnings and ends of the trained runs of tokens."""
    padded = np.concatenate([[False], example.loss_weights > 0, [False]]).astype(np.int8)
    yield from zip(np.flatnonzero(np.diff(padded) == 1), np.flatnonzero(np.diff(padded) == -1), strict=True)


def spans_of(name: str, examples: Sequence[TokenizedExample]) -> list[tuple[str, str]]:
    """What stands before each trained run of tokens, and the run, as texts."""
    return sorted(
        (decoded(name, example.input_ids[:start]), decoded(name, example.input_ids[start:end]))
        for example in examples
        for start, end in trained_spans(example)
    )


def answers(messages: Sequence[Message]) -> list[int]:
    """Positions of the messages that are to be learned."""
    return [at for at, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1)]


def expected_reply(name: str, message: Message) -> str:
    family = FAMILIES[name]
    return family.before + family.words(message["content"]) + family.after + family.end


def attempt(name: str, messages: Sequence[Message], tools: Any = None) -> list[TokenizedExample] | None:
    """The examples that a conversation makes; none where it is refused, which must be by the name of its row."""
    try:
        return encoder_of(name).encode_example(MessagesExample(tuple(messages), HERE, tools=tools))
    except DataError as error:
        if str(HERE) not in str(error):
            raise AssertionError(f"a refusal does not say where: {error}") from error
        return None


def refuse(name: str, messages: Sequence[Message], tools: Any = None) -> None:
    """Makes sure that a conversation is refused by the name of its row."""
    with pytest.raises(DataError, match=NAMED):
        encoder_of(name).encode_example(MessagesExample(tuple(messages), HERE, tools=tools))


def check(name: str, messages: Sequence[Message], may_refuse: bool = False) -> list[TokenizedExample]:
    """Encodes a conversation and compares it with what the template says; returns the examples."""
    family, tokenizer, encoder = FAMILIES[name], tokenizer_of(name), encoder_of(name)
    examples = attempt(name, messages)
    if examples is None:
        assert may_refuse
        return []
    expected = [(context_of(name, messages[:at]), expected_reply(name, messages[at])) for at in answers(messages)]
    assert spans_of(name, examples) == sorted(expected)
    check_tokens(name, examples)
    for at in answers(messages):
        prompt = list(encoder.encode_prompt(messages[:at]))
        contexts = [list(example.input_ids[:start]) for example in examples for start, _ in trained_spans(example)]
        assert prompt in contexts, "a prompt in training is not the prompt at generation"
        earlier = [message["content"] for message in messages[:at]]
        if all(words == words.strip() for words in earlier):
            # otherwise whitespace round the words may form tokens with what the template puts round them
            assert prompt == tokenized(name, rendered(name, messages[:at], prompt=True))
        if family.bos and name not in ("chatml", "llama-2", "granite-3.0"):
            assert prompt.count(tokenizer.bos_token_id) <= 1
    return examples


def check_tokens(name: str, examples: Sequence[TokenizedExample]) -> None:
    """What holds for every example: its types, that it stops, and that it does not stop before."""
    family, encoder = FAMILIES[name], encoder_of(name)
    stop = tokenizer_of(name).convert_tokens_to_ids(family.end)
    assert stop in encoder.stop_ids
    for example in examples:
        assert example.origin == HERE
        assert example.input_ids.dtype == np.int32
        assert example.loss_weights.dtype == np.float32
        assert len(example.input_ids) == len(example.loss_weights)
        assert not example.loss_weights[0]
        assert example.loss_weights[-1], "what follows the last answer teaches nothing"
        for start, end in trained_spans(example):
            assert example.input_ids[end - 1] == stop
            assert not set(example.input_ids[start : end - 1].tolist()) & set(encoder.stop_ids)


def conversation(turns: int, system: bool, first: int = 0, words: Sequence[str] = WORDS) -> list[Message]:
    """A conversation whose contents are `words`, one after another from `first` on."""
    roles = ["system"] * system + ["user", "assistant"] * turns
    return [Message(role=role, content=words[(first + at) % len(words)]) for at, role in enumerate(roles)]


def has_special(name: str, messages: Sequence[Message]) -> bool:
    return any(token in message["content"] for message in messages for token in FAMILIES[name].names)


# --- the templates themselves ---------------------------------------------------------------------------------------

ASKED = [
    Message(role="system", content="Be brief."),
    Message(role="user", content="Who rows?"),
    Message(role="assistant", content=" The ferryman. "),
    Message(role="user", content="Why?"),
]


@pytest.mark.parametrize(
    ("name", "system", "expected"),
    [
        (
            "chatml",
            False,
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\nWho rows?<|im_end|>\n<|im_start|>assistant\n The ferryman. <|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama-3.1",
            True,
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWho rows?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nThe ferryman.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "llama-2",
            True,
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWho rows? [/INST] The ferryman. </s><s>[INST] Why? [/INST]",
        ),
        (
            "mistral-v1",
            True,
            "<s> [INST] Be brief.\n\nWho rows? [/INST]  The ferryman. </s> [INST] Why? [/INST]",
        ),
        ("mistral-v3", True, "<s>[INST] Who rows?[/INST] The ferryman.</s>[INST] Be brief.\n\nWhy?[/INST]"),
        ("mistral-nemo", True, "<s>[INST]Who rows?[/INST] The ferryman. </s>[INST]Be brief.\n\nWhy?[/INST]"),
        (
            "gemma-2",
            False,
            "<bos><start_of_turn>user\nWho rows?<end_of_turn>\n<start_of_turn>model\nThe ferryman.<end_of_turn>\n<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            "gemma-3",
            True,
            "<bos><start_of_turn>user\nBe brief.\n\nWho rows?<end_of_turn>\n<start_of_turn>model\nThe ferryman.<end_of_turn>\n<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            "qwen3",
            True,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho rows?<|im_end|>\n<|im_start|>assistant\n The ferryman. <|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "phi-3",
            True,
            "<|system|>\nBe brief.<|end|>\n<|user|>\nWho rows?<|end|>\n<|assistant|>\n The ferryman. <|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n",
        ),
        (
            "phi-4",
            True,
            "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Who rows?<|im_end|><|im_start|>assistant<|im_sep|> The ferryman. <|im_end|><|im_start|>user<|im_sep|>Why?<|im_end|><|im_start|>assistant<|im_sep|>",
        ),
        (
            "zephyr",
            True,
            "<|system|>\nBe brief.</s>\n<|user|>\nWho rows?</s>\n<|assistant|>\n The ferryman. </s>\n<|user|>\nWhy?</s>\n<|assistant|>\n",
        ),
        (
            "deepseek-v3",
            True,
            "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Who rows?<｜Assistant｜> The ferryman. <｜end▁of▁sentence｜><｜User｜>Why?<｜Assistant｜>",
        ),
        (
            "deepseek-r1",
            True,
            "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Who rows?<｜Assistant｜> The ferryman. <｜end▁of▁sentence｜><｜User｜>Why?<｜Assistant｜><think>\n",
        ),
        (
            "deepseek-r1-first",
            True,
            "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Who rows?<｜Assistant｜> The ferryman. <｜end▁of▁sentence｜><｜User｜>Why?<｜Assistant｜>",
        ),
        (
            "command-r",
            True,
            "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Who rows?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>The ferryman.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Why?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ),
        (
            "granite-3.0",
            True,
            "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Who rows?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|> The ferryman. <|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Why?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        ),
    ],
)
def test_the_templates_write_what_the_specifications_say(name: str, system: bool, expected: str) -> None:
    assert rendered(name, ASKED[0 if system else 1 :], prompt=True) == expected


def test_every_template_is_tested_and_described() -> None:
    names = {path.stem for path in TEMPLATES.glob("*.jinja")}
    assert names == {*(name.removesuffix("+") for name in FAMILIES), *HOSTILE}
    described = (TEMPLATES / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in described for name in names)


def called(text: str = "") -> list[Message]:
    """A question that is answered with the help of a tool."""
    call = {"type": "function", "id": "call00001", "function": {"name": "depth", "arguments": {"river": "the old"}}}
    return [
        Message(role="user", content="How deep is it?"),
        Message(role="assistant", content=text, tool_calls=[call]),
        Message(role="tool", content="four feet", tool_call_id="call00001", name="depth"),
        Message(role="assistant", content="Deep enough to drown."),
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "llama-3.1",
            '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "depth", "parameters": {"river": "the old"}}<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n"four feet"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n',
        ),
        (
            "mistral-v3",
            '[INST] How deep is it?[/INST][TOOL_CALLS] [{"name": "depth", "arguments": {"river": "the old"}, "id": "call00001"}]</s>[TOOL_RESULTS] {"content": four feet, "call_id": "call00001"}[/TOOL_RESULTS]',
        ),
        (
            "mistral-nemo",
            '"required": ["river"]}}}][/AVAILABLE_TOOLS][INST]How deep is it?[/INST][TOOL_CALLS][{"name": "depth", "arguments": {"river": "the old"}, "id": "call00001"}]</s>[TOOL_RESULTS]{"content": four feet, "call_id": "call00001"}[/TOOL_RESULTS]',
        ),
        (
            "qwen3",
            '<|im_start|>assistant\n<tool_call>\n{"name": "depth", "arguments": {"river": "the old"}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nfour feet\n</tool_response><|im_end|>\n<|im_start|>assistant\n',
        ),
    ],
)
def test_the_templates_write_tools_as_the_specifications_say(name: str, expected: str) -> None:
    text = rendered(name, called()[:3], prompt=True, tools=[DEPTH])
    assert text.endswith(expected)
    assert '"name": "depth", "description"' in text.replace("\n", "").replace(" " * 8, " ")


# --- what is trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "turns", "system"),
    [case for case in product(TRAINABLE, (1, 2, 3), (False, True)) if FAMILIES[case[0]].system or not case[2]],
)
def test_each_answer_is_trained_once_after_the_prompt_that_generation_gives(
    name: str, turns: int, system: bool
) -> None:
    for first in range(len(WORDS)):
        messages = conversation(turns, system, first)
        if has_special(name, messages):
            refuse(name, messages)
        else:
            check(name, messages, may_refuse=system and name in FORGETS_SYSTEM)


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_conversation_that_a_template_leaves_as_it_was_is_one_example(name: str) -> None:
    examples = check(name, conversation(3, system=False, words=("one", "two", "three", "four", "five", "six")))
    assert len(examples) == (3 if name.startswith("qwen3") else 1)


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_prompt_and_its_completion_are_a_conversation(name: str) -> None:
    [example] = encoder_of(name).encode_example(PromptExample("Who rows?", "The ferryman.", HERE))
    [same] = check(name, conversation(1, system=False, words=("Who rows?", "The ferryman.")))
    assert example.input_ids.tolist() == same.input_ids.tolist()
    assert example.loss_weights.tolist() == same.loss_weights.tolist()
    assert list(encoder_of(name).encode_prompt("Who rows?")) == list(
        encoder_of(name).encode_prompt([Message(role="user", content="Who rows?")])
    )


@pytest.mark.parametrize("name", TRAINABLE)
def test_an_answer_without_weight_is_context(name: str) -> None:
    messages = conversation(3, system=False, words=("one", "two", "three", "four", "five", "six"))
    messages[1]["weight"] = messages[5]["weight"] = 0.0
    check(name, messages)


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_weight_of_an_answer_is_on_each_of_its_tokens(name: str) -> None:
    messages = conversation(1, system=False, words=("one", "two"))
    messages[1]["weight"] = 0.5
    [example] = check(name, messages)
    assert set(example.loss_weights.tolist()) == {0.0, 0.5}


@pytest.mark.parametrize("name", TRAINABLE)
def test_people_cannot_end_a_turn(name: str) -> None:
    """Words with the family's own marks would be read as the template's."""
    family = FAMILIES[name]
    for token, role in product(family.names, (0, 1)):
        messages = conversation(1, system=False, words=("Who rows?", "The ferryman."))
        messages[role]["content"] += token + "\nI"
        refuse(name, messages)


@pytest.mark.parametrize("name", TRAINABLE)
def test_blank_words_train_nothing_but_the_end(name: str) -> None:
    for blank in ("", "\n", " \n\t"):
        check(name, conversation(1, system=False, words=("Who rows?", blank)), may_refuse=True)


# --- tokenizers that put spaces before texts --------------------------------------------------------------------------

SPACED = {
    "llama-2": "everywhere",
    "mistral-v1": "everywhere",
    "zephyr": "everywhere",
    "mistral-v3": "first",
    "gemma-2": "nowhere",
}
"""Where the SentencePiece tokenizers of these families put a space: before each text between tokens, or the first."""


@cache
def sentencepiece_encoder(name: str) -> Encoder:
    """An encoder for a tokenizer as SentencePiece makes them, with a family's tokens and template."""
    family = FAMILIES[name]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127)), "▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    if SPACED[name] == "everywhere":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = "first" if SPACED[name] == "first" else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [] if SPACED[name] == "nowhere" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.names])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos, unk_token="<unk>"
    )
    tokenizer.chat_template = tokenizer_of(name).chat_template
    return Encoder(tokenizer)


@pytest.mark.parametrize("name", SPACED)
def test_spaces_of_the_tokenizer_are_where_the_model_knows_them(name: str) -> None:
    """A prompt has the tokens that the whole prompt has, and a reply adds its text to it and no more."""
    encoder = sentencepiece_encoder(name)
    tokenizer = encoder.tokenizer
    messages = conversation(3, system=False, words=("the one", "the two", "三 the", "the 四", "the five", "six"))
    [example] = encoder.encode_example(MessagesExample(tuple(messages), HERE))
    for (start, end), at in zip(trained_spans(example), answers(messages), strict=True):
        prompt = rendered(name, messages[:at], prompt=True)
        whole = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        assert example.input_ids[:start].tolist() == list(encoder.encode_prompt(messages[:at]))
        before, after = (tokenizer.decode(example.input_ids[:length].tolist()) for length in (start, end))
        assert after == before + expected_reply(name, messages[at])
        assert example.input_ids[:start].tolist() == whole


# --- thoughts -------------------------------------------------------------------------------------------------------

THOUGHTFUL = [
    Message(role="user", content="Who rows?"),
    Message(role="assistant", content="<think>\nIt is his boat.\n</think>\n\nThe ferryman."),
    Message(role="user", content="Why?"),
    Message(role="assistant", content="<think>\nThere is no bridge.\n</think>\n\nTo cross."),
    Message(role="user", content="And then?"),
    Message(role="assistant", content="<think>\nHe lives here.\n</think>\n\nBack."),
]


def with_reasoning(messages: Sequence[Message]) -> list[Message]:
    """The same conversation with the thoughts beside the words."""
    apart = []
    for message in messages:
        thought, end, words = message["content"].partition("\n</think>\n\n")
        if end:
            message = Message(role="assistant", content=words, reasoning_content=thought.removeprefix("<think>\n"))
        apart.append(message)
    return apart


@pytest.mark.parametrize("apart", [False, True])
def test_qwen3_learns_each_thought_once_and_never_sees_an_earlier_one(apart: bool) -> None:
    messages = with_reasoning(THOUGHTFUL) if apart else THOUGHTFUL
    examples = encoder_of("qwen3").encode_example(MessagesExample(tuple(messages), HERE))
    check_tokens("qwen3", examples)
    assert spans_of("qwen3", examples) == sorted(
        (rendered("qwen3", messages[:at], prompt=True), THOUGHTFUL[at]["content"] + "<|im_end|>")
        for at in answers(messages)
    )


def test_qwen3_with_and_without_thoughts_in_one_conversation() -> None:
    """An answer without a thought is written after an empty one."""
    messages = [*THOUGHTFUL[:2], Message(role="user", content="Why?"), Message(role="assistant", content="To cross.")]
    examples = encoder_of("qwen3").encode_example(MessagesExample(tuple(messages), HERE))
    check_tokens("qwen3", examples)
    assert spans_of("qwen3", examples) == sorted(
        [
            (rendered("qwen3", messages[:1], prompt=True), messages[1]["content"] + "<|im_end|>"),
            (rendered("qwen3", messages[:3], prompt=True), "<think>\n\n</think>\n\nTo cross.<|im_end|>"),
        ]
    )


@pytest.mark.parametrize("apart", [False, True])
def test_a_prompt_that_closed_the_thought_leaves_no_place_for_one(apart: bool) -> None:
    refuse("qwen3+", with_reasoning(THOUGHTFUL) if apart else THOUGHTFUL)


@pytest.mark.parametrize("name", OPENS_THOUGHT)
@pytest.mark.parametrize("apart", [False, True])
def test_a_thought_that_the_prompt_opens_is_trained_from_there_on(name: str, apart: bool) -> None:
    """DeepSeek R1's template never shows a thought, so its examples may be refused."""
    messages = with_reasoning(THOUGHTFUL) if apart else THOUGHTFUL
    examples = attempt(name, messages)
    if examples is None:
        assert name == "deepseek-r1"
        return
    check_tokens(name, examples)
    assert spans_of(name, examples) == sorted(
        (
            rendered(name, messages[:at], prompt=True),
            THOUGHTFUL[at]["content"].removeprefix("<think>\n") + FAMILIES[name].end,
        )
        for at in answers(messages)
    )


@pytest.mark.parametrize("name", OPENS_THOUGHT)
def test_words_are_not_trained_as_a_thought(name: str) -> None:
    """Where the prompt opens a thought, an answer without one closes it first, or is refused."""
    messages = conversation(2, system=False, words=("Who rows?", "The ferryman.", "Why?", "To cross."))
    examples = attempt(name, messages)
    if examples is not None:
        check_tokens(name, examples)
        assert spans_of(name, examples) == sorted(
            (rendered(name, messages[:at], prompt=True), expected_reply(name, messages[at])) for at in answers(messages)
        )


def test_deepseek_learns_each_thought_once_and_never_sees_an_earlier_one() -> None:
    """Its template shows no thought at all, so the example is refused or made of the words as they are."""
    name = "deepseek-r1-first"
    examples = attempt(name, THOUGHTFUL)
    if examples is None:
        return
    check_tokens(name, examples)
    assert spans_of(name, examples) == sorted(
        (rendered(name, THOUGHTFUL[:at], prompt=True), THOUGHTFUL[at]["content"] + DEEPSEEK.end)
        for at in answers(THOUGHTFUL)
    )


@pytest.mark.parametrize("name", [name for name in TRAINABLE if name not in ("qwen3", "qwen3+", "deepseek-r1-first")])
def test_a_thought_in_the_words_is_words_to_other_families(name: str) -> None:
    check(name, THOUGHTFUL)


@pytest.mark.parametrize("name", [name for name in TRAINABLE if name not in ("qwen3", "qwen3+")])
def test_a_thought_beside_the_words_is_not_lost_in_silence(name: str) -> None:
    """These templates do not show it; so it is trained as it was thought, or not at all."""
    messages = with_reasoning(THOUGHTFUL)
    examples = attempt(name, messages)
    if examples is None:
        return
    check_tokens(name, examples)
    assert [
        (context, reply.replace(" " + FAMILIES[name].end, FAMILIES[name].end))
        for context, reply in spans_of(name, examples)
    ] == sorted(
        (
            context_of(name, messages[:at]),
            THOUGHTFUL[at]["content"] + FAMILIES[name].end,
        )
        for at in answers(messages)
    )


# --- tools ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_call_is_trained_and_what_the_tool_says_is_context(name: str) -> None:
    messages = called()
    examples = encoder_of(name).encode_example(MessagesExample(tuple(messages), HERE, tools=[DEPTH]))
    check_tokens(name, examples)
    end = FAMILIES[name].end
    expected = []
    for at in (1, 3):
        prompt = rendered(name, messages[:at], prompt=True, tools=[DEPTH])
        shown = rendered(name, messages[: at + 1], prompt=False, tools=[DEPTH])
        assert shown.startswith(prompt), "the test does not know this family"
        reply, found, _ = shown[len(prompt) :].partition(end)
        expected.append((prompt, reply + found))
        assert list(encoder_of(name).encode_prompt(messages[:at], tools=[DEPTH])) == tokenized(name, prompt)
    found = spans_of(name, examples)
    assert found == sorted(expected)
    [(first, call), (second, answer)] = sorted(found, key=lambda span: len(span[0]))
    assert '"name": "depth"' in call
    assert json.dumps({"river": "the old"}) in call
    assert "How deep a river is." in first
    assert "four feet" in second
    assert "four feet" not in call + answer
    assert answer == expected_reply(name, messages[3])


@pytest.mark.parametrize("name", WITHOUT_TOOLS)
def test_a_family_that_cannot_call_refuses_to_learn_it(name: str) -> None:
    for tools in (None, [DEPTH]):
        examples = attempt(name, called(), tools)
        if examples is not None:
            assert name.startswith("deepseek"), "only these write calls at all"
            assert any(json.dumps({"river": "the old"}) in reply for _, reply in spans_of(name, examples))


@pytest.mark.parametrize("name", WITHOUT_TOOLS)
def test_tools_that_a_template_does_not_show_are_not_lost_in_silence(name: str) -> None:
    messages = conversation(1, system=False, words=("Who rows?", "The ferryman."))
    if name == "granite-3.0":  # it shows tools, though it cannot call them as others do
        [example] = encoder_of(name).encode_example(MessagesExample(tuple(messages), HERE, tools=[DEPTH]))
        [(context, reply)] = spans_of(name, [example])
        assert context == rendered(name, messages[:1], prompt=True, tools=[DEPTH])
        assert reply == expected_reply(name, messages[1])
    else:
        refuse(name, messages, tools=[DEPTH])


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_words_beside_a_call_are_trained_or_refused(name: str) -> None:
    """Llama's and Mistral's templates drop them; Qwen's writes them before the call."""
    said = "I shall look."
    examples = attempt(name, called(said), tools=[DEPTH])
    if examples is None:
        assert not name.startswith("qwen3")
    else:
        check_tokens(name, examples)
        [reply] = [reply for _, reply in spans_of(name, examples) if '"name": "depth"' in reply]
        assert said in reply


@pytest.mark.parametrize("said", ["", "I shall look."])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_thought_before_a_call_is_trained_or_refused(name: str, apart: bool, said: str) -> None:
    """Qwen's template writes it; the others drop it, beside a call or always."""
    messages = called(said if apart else f"<think>\nI cannot know.\n</think>\n\n{said}")
    if apart:
        messages[1]["reasoning_content"] = "I cannot know."
    examples = attempt(name, messages, tools=[DEPTH])
    if examples is None:
        assert name != "qwen3"
        return
    check_tokens(name, examples)
    [(context, reply)] = [span for span in spans_of(name, examples) if '"name": "depth"' in span[1]]
    assert context == rendered(name, messages[:1], prompt=True, tools=[DEPTH])
    assert "<think>\nI cannot know.\n</think>" in reply
    assert said in reply


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_calls_and_answers_may_hold_anything_that_json_can(name: str) -> None:
    arguments = {'a "b"': ["雪\n", 1.5, True, None, {"deep": [[]]}], "path": "C:\\x", "end": "</tool_call>", "none": {}}
    messages = called()
    messages[1]["tool_calls"][0]["function"]["arguments"] = arguments
    messages[2]["content"] = json.dumps({"feet": [4, 'four "feet"\n雪']}, ensure_ascii=False)
    examples = encoder_of(name).encode_example(MessagesExample(tuple(messages), HERE, tools=[DEPTH]))
    check_tokens(name, examples)
    [call] = [reply for _, reply in spans_of(name, examples) if '"name": "depth"' in reply]
    assert json.dumps(arguments, ensure_ascii=False) in call
    assert sorted(context for context, _ in spans_of(name, examples)) == sorted(
        rendered(name, messages[:at], prompt=True, tools=[DEPTH]) for at in (1, 3)
    )


def test_an_identifier_that_mistral_refuses_is_a_fault_of_the_row() -> None:
    messages = called()
    del messages[1]["tool_calls"][0]["id"]
    refuse("mistral-v3", messages, tools=[DEPTH])


def test_two_calls_at_once_are_trained_together_or_refused() -> None:
    messages = called()
    messages[1]["tool_calls"] *= 2
    examples = encoder_of("qwen3").encode_example(MessagesExample(tuple(messages), HERE, tools=[DEPTH]))
    [reply] = [reply for _, reply in spans_of("qwen3", examples) if "depth" in reply]
    assert reply.count('"name": "depth"') == 2
    refuse("llama-3.1", messages, tools=[DEPTH])


def test_an_earlier_call_is_seen_as_mistral_shows_it() -> None:
    """The tools move to the last question, so an earlier stretch of turns is an example of its own."""
    messages = [*called(), *called()[:1], Message(role="assistant", content="Four feet, as I said.")]
    messages[4]["content"] = "Once more?"
    examples = encoder_of("mistral-nemo").encode_example(MessagesExample(tuple(messages), HERE, tools=[DEPTH]))
    check_tokens("mistral-nemo", examples)
    spans = spans_of("mistral-nemo", examples)
    assert [context for context, _ in spans] == sorted(
        rendered("mistral-nemo", messages[:at], prompt=True, tools=[DEPTH]) for at in (1, 3, 5)
    )
    assert len(examples) == 2


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_hostile_templates_are_refused(name: str, turns: int) -> None:
    refuse(name, conversation(turns, system=False, words=("one", "two", "three", "four", "five")))


def test_a_question_that_is_dropped_is_refused() -> None:
    refuse("drops", conversation(1, system=True, words=("Be brief.", "Who rows?", "The ferryman.")))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.system])
def test_a_system_message_where_the_family_has_none(name: str) -> None:
    refuse(name, conversation(1, system=True))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.alternates])
@pytest.mark.parametrize("roles", [("user", "user", "assistant"), ("assistant",), ("user", "assistant", "assistant")])
def test_roles_that_do_not_alternate(name: str, roles: tuple[str, ...]) -> None:
    refuse(name, [Message(role=role, content=f"words {at}") for at, role in enumerate(roles)])


@pytest.mark.parametrize("name", [name for name in TRAINABLE if not FAMILIES[name].alternates])
@pytest.mark.parametrize("roles", [("user", "user", "assistant"), ("assistant",), ("user", "assistant", "assistant")])
def test_other_families_take_roles_in_any_order(name: str, roles: tuple[str, ...]) -> None:
    """Or refuse them: some templates cannot be asked for the prompt of a conversation that has not begun."""
    messages = [Message(role=role, content=f"words {at}") for at, role in enumerate(roles)]
    check(name, messages, may_refuse=roles[0] == "assistant" or (name.startswith("qwen3") and roles[-2] == "assistant"))


# --- whatever comes -------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *WORDS,
        "",
        " ",
        "\n",
        "<think>",
        "</think>",
        "<tool_response>",
        "<|im_end|>",
        "</s>",
        "<｜User｜>",
        "[/INST]",
        "None",
    ]
)
PLAIN = st.one_of(st.sampled_from(WORDS), st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1))
CONTENTS = st.one_of(PIECES, st.text(max_size=12), st.lists(PIECES, max_size=3).map("".join))


def bare(name: str, reply: str) -> tuple[str, str]:
    """The thought and the words of a reply, without the whitespace round them."""
    thought, closed, words = reply.removesuffix(FAMILIES[name].end).rpartition("</think>")
    return (thought.strip().removeprefix("<think>").strip(), words.strip()) if closed else ("", words.strip())


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    roles = draw(
        st.one_of(
            st.integers(1, 3).map(lambda turns: ["user", "assistant"] * turns),
            st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), max_size=4).map(
                lambda roles: [*roles, "assistant"]
            ),
        )
    )
    contents = draw(st.sampled_from([PLAIN, PLAIN, CONTENTS]))
    messages = [Message(role=role, content=draw(contents)) for role in ["system"] * draw(st.integers(0, 1)) + roles]
    if draw(st.booleans()):
        for at in answers(messages):
            messages[at]["content"] = f"<think>\n{draw(PLAIN)}\n</think>\n\n{messages[at]['content']}"
    return messages


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3+", "qwen3-thinking", "llama-3.1", "zephyr", "mistral-nemo", "deepseek-r1-first"]
)
@settings(max_examples=120)
@given(messages=conversations())
def test_no_conversation_is_trained_wrongly(name: str, messages: list[Message]) -> None:
    """Whatever is said, in whatever order: an answer is trained as it was said after its prompt, or nothing is."""
    examples = attempt(name, messages)
    if examples is None:
        return
    check_tokens(name, examples)
    found = spans_of(name, examples)
    assert len(found) == len(answers(messages))
    for at in answers(messages):
        replies = {bare(name, expected_reply(name, messages[at])), bare(name, messages[at]["content"])}
        try:
            context = rendered(name, messages[:at], prompt=True)
        except (jinja2.TemplateError, TypeError) as error:
            pytest.fail(f"trained after a prompt that the template refuses: {error}")
        match = [span for span in found if span[0] == context and bare(name, span[1]) in replies]
        assert match, (context, replies, found)
        found.remove(match[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_short_way_to_render_is_that_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its compiler is not to be had, its `apply_chat_template` does the same."""
    talks = [conversation(turns, system) for turns, system in product((1, 2), (False, True))]
    short = [attempt(name, talk) for talk in talks]
    monkeypatch.setattr("finespun.data.templates._compile_jinja_template", None)
    for talk, examples in zip(talks, short, strict=True):
        again = attempt(name, talk)
        assert (again is None) == (examples is None)
        for one, other in zip(again or [], examples or [], strict=True):
            assert one.input_ids.tolist() == other.input_ids.tolist()
            assert one.loss_weights.tolist() == other.loss_weights.tolist()
