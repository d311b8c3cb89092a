"""Which tokens are trained, for real and for difficult tokenizers and chat templates."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conftest import CHATML
from finespun.data.formats import Message, MessagesExample, PromptExample, TextExample
from finespun.data.readers import Origin
from finespun.data.templates import Encoder, TokenizedExample, resolve_prompt_format
from finespun.errors import DataError, ModelError

HERE = Origin("test", 1)
TALK = (
    Message(role="system", content="Be brief."),
    Message(role="user", content="Who rows?\n"),
    Message(role="assistant", content="The ferryman.\n\nHe rows."),
    Message(role="user", content="江雪?"),
    Message(role="assistant", content="独钓寒江雪 🙂"),
    Message(role="user", content="Thanks."),
)


@pytest.fixture
def smollm2_tokenizer(smollm2_folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture
def tokenizer(small_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> PreTrainedTokenizerFast:
    """A copy of the small tokenizer whose template a test may change."""
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")


def trained_runs(tokenizer: PreTrainedTokenizerFast, example: TokenizedExample) -> list[str]:
    """Texts of the trained runs of tokens."""
    runs: list[list[int]] = []
    before = 0.0
    for token, weight in zip(example.input_ids, example.loss_weights, strict=True):
        if weight and not before:
            runs.append([])
        if weight:
            runs[-1].append(token)
        before = weight
    return [tokenizer.decode(run) for run in runs]


def test_only_the_assistants_words_and_end_of_turn_are_trained(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(smollm2_tokenizer)
    (example,) = encoder.encode_example(MessagesExample(TALK, HERE))
    assert trained_runs(smollm2_tokenizer, example) == [
        "The ferryman.\n\nHe rows.<|im_end|>",
        "独钓寒江雪 🙂<|im_end|>",
    ]
    whole = smollm2_tokenizer.apply_chat_template(list(TALK[:5]), tokenize=False)
    assert smollm2_tokenizer.decode(example.input_ids) == whole.removesuffix("\n")
    prompt = encoder.encode_prompt(TALK[:4])
    assert prompt == example.input_ids[: len(prompt)].tolist()


def test_a_prompt_is_what_the_chat_template_makes_of_it(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [Message(role="user", content="Write a fable titled The Heron.")]
    expected = smollm2_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert Encoder(smollm2_tokenizer).encode_prompt("Write a fable titled The Heron.") == expected


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (CHATML.replace("message['content']", "message['content'] | upper"), "does not repeat message 2"),
        (CHATML.replace("message['content']", "(message['content'] if loop.last else '')"), "does not repeat message"),
        ("{{ raise_exception('no') }}", "does not take a conversation"),
    ],
)
def test_a_template_that_changes_what_was_said_is_refused(
    tokenizer: PreTrainedTokenizerFast, template: str, why: str
) -> None:
    encoder = Encoder(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=why):
        encoder.encode_example(MessagesExample(TALK[1:5], HERE))


def test_a_prompt_that_a_template_leaves_out_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = [Message(role="user", content="Where is the ferry?")]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    encoder = Encoder(tokenizer)
    assert "ferry" in tokenizer.decode(encoder.encode_prompt(asked))
    with pytest.raises(DataError, match="does not show the tool 'look'"):
        encoder.encode_prompt(asked, tools)
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'] | replace('ferry', 'mill')")
    with pytest.raises(DataError, match="leaves out message 1, the user's, or changes it"):
        encoder.encode_prompt(asked)


def test_a_template_that_strips_still_trains_the_words(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'] | trim")
    (example,) = Encoder(tokenizer).encode_example(PromptExample("who?", " the ferryman \n", HERE))
    assert trained_runs(tokenizer, example) == ["the ferryman<|im_end|>"]


def test_a_template_without_an_end_of_turn_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    with pytest.raises(ModelError, match="cannot learn to stop"):
        Encoder(tokenizer).encode_example(PromptExample("who?", "the ferryman", HERE))
    assert Encoder(tokenizer).stop_ids == (tokenizer.eos_token_id,), "it can still be used for writing"


def test_a_template_that_thinks_before_an_answer_trains_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    """As Qwen3's does: an empty thought stands in the prompt if thinking is off, and in the last answer always."""
    thought = "<think>\\n\\n</think>\\n\\n"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '" + thought + "' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '" + thought + "' }}{% endif %}{% endif %}"
    )
    resolve_prompt_format(tokenizer, "messages", None)
    encoder = Encoder(tokenizer)
    (example,) = encoder.encode_example(PromptExample("who?", "the ferryman", HERE))
    assert trained_runs(tokenizer, example) == ["the ferryman<|im_end|>"]
    prompt = encoder.encode_prompt("who?")
    assert tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
    assert example.input_ids[: len(prompt)].tolist() == prompt


def test_a_special_token_in_a_message_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"test, row 1: the user's words contain '<\|im_end\|>'"):
        Encoder(tokenizer).encode_example(PromptExample("a<|im_end|>b", "c", HERE))


def test_a_model_without_a_chat_template_gets_a_plain_one_for_messages(gpt2_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    vocabulary = len(tokenizer)
    assert resolve_prompt_format(tokenizer, "messages", None) == "chat"
    (example,) = Encoder(tokenizer, "chat").encode_example(MessagesExample(TALK, HERE))
    assert trained_runs(tokenizer, example) == ["The ferryman.\n\nHe rows.<|endoftext|>", "独钓寒江雪 🙂<|endoftext|>"]
    assert len(tokenizer) == vocabulary


@pytest.mark.parametrize(
    ("shape", "wanted", "has_template", "expected"),
    [
        ("text", None, True, "raw"),
        ("prompt+completion", None, True, "chat"),
        ("prompt+completion", None, False, "raw"),
        ("prompt+completion", "raw", True, "raw"),
        ("prompt+completion", "chat", False, "chat"),
        ("messages", None, True, "chat"),
    ],
)
def test_the_saved_tokenizer_tells_how_the_model_is_prompted(
    tokenizer, shape, wanted, has_template: bool, expected: str
) -> None:
    if not has_template:
        tokenizer.chat_template = None
    assert resolve_prompt_format(tokenizer, shape, wanted) == expected
    assert bool(tokenizer.chat_template) == (expected == "chat")
    assert Encoder(tokenizer).prompt_format == expected


def test_formats_that_do_not_go_together(tokenizer: PreTrainedTokenizerFast) -> None:
    for shape, wanted in (("messages", "raw"), ("text", "chat")):
        with pytest.raises(DataError, match="does not go with"):
            resolve_prompt_format(tokenizer, shape, wanted)


@pytest.fixture(scope="module")
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Like Llama 2's: a text gets a space in front (shown as ▁) and unknown characters become bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *[f"<0x{byte:02X}>" for byte in range(256)],
        "▁",
        *"abcdefghijklmnopqrstuvwxyz.",
        "▁the",
        "▁fer",
        "ry",
        "man",
    ]
    merges = [
        ("▁", "t"),
        ("▁t", "h"),
        ("▁th", "e"),
        ("r", "y"),
        ("▁", "f"),
        ("▁f", "e"),
        ("▁fe", "r"),
        ("m", "a"),
        ("ma", "n"),
    ]
    pieces += [a + b for a, b in merges if a + b not in pieces]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("completion", ["man", " man", "the ferryman.", "\nthe", "é江"])
def test_a_tokenizer_that_puts_a_space_before_texts_puts_none_between_prompt_and_completion(
    sentencepiece_like, completion: str
) -> None:
    encoder = Encoder(sentencepiece_like, "raw")
    (example,) = encoder.encode_example(PromptExample("the ferry", completion, HERE))
    assert sentencepiece_like.decode(example.input_ids, skip_special_tokens=True) == "the ferry" + completion
    prompt = encoder.encode_prompt("the ferry")
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert encoder.decode(example.input_ids[len(prompt) :]) == completion


def test_a_text_that_the_tokenizer_cannot_write_is_refused() -> None:
    backend = Tokenizer(models.BPE({"<unk>": 0, "</s>": 1, "a": 2}, [], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(DataError, match="tokenizer cannot write the text: '雪'"):
        Encoder(tokenizer, "raw").encode_example(TextExample("aa雪", HERE))
