"""Go templates that Ollama renders, beside the chat templates that they stand for. A small evaluator renders them here;
a slow test does it with Go itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gguf import GGUFWriter
from transformers import PreTrainedTokenizerFast

from conftest import CHATML
from finespun.data.templates import CHATML_TEMPLATE, PLAIN_CHAT_TEMPLATE, Encoder
from finespun.errors import ModelError
from finespun.export.ollama import ChatPieces, chat_pieces, modelfile, write_modelfile
from finespun.models.load import LoadedModel

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"

Messages = list[dict[str, str]]

SENTENCE_PIECE = ("<s>", "</s>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
DERIVABLE: dict[str, tuple[str, str]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "command-r": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek-r1": DEEPSEEK,
    "deepseek-r1-first": DEEPSEEK,
    "deepseek-v3": DEEPSEEK,
    "gemma-2": ("<bos>", "<eos>"),
    "gemma-3": ("<bos>", "<eos>"),
    "granite-3.0": ("<|end_of_text|>", "<|end_of_text|>"),
    "llama-2": SENTENCE_PIECE,
    "llama-3.1": ("<|begin_of_text|>", "<|eot_id|>"),
    "mistral-nemo": SENTENCE_PIECE,
    "mistral-v1": SENTENCE_PIECE,
    "mistral-v3": SENTENCE_PIECE,
    "phi-3": ("<s>", "<|endoftext|>"),
    "phi-4": ("<|endoftext|>", "<|im_end|>"),
    "qwen3": ("<|endoftext|>", "<|im_end|>"),
    "qwen3-thinking": ("<|endoftext|>", "<|im_end|>"),
    "zephyr": SENTENCE_PIECE,
}
"""Families whose template can be written for Ollama, with their BOS and EOS."""

NOT_DERIVABLE = ("drops", "reorders", "rewrites")

WITHOUT_SYSTEM = ("gemma-2",)

HOSTILE = '{{ .System }}{{- end }} """ \\n "x" {% if %} </s><|im_end|> \u200b\ufeff ｜'

CONVERSATIONS: list[Messages] = [
    [{"role": role, "content": words} for role, words in turns]
    for turns in [
        [("user", "What is a heron?")],
        [("system", "Answer in rhyme."), ("user", "What is\n\na heron?")],
        [("user", "雪"), ("assistant", "江雪。"), ("user", "🙂 …")],
        [("system", HOSTILE), ("user", HOSTILE), ("assistant", HOSTILE), ("user", HOSTILE)],
        [("system", "s"), *[("user", "same"), ("assistant", "same")] * 4, ("user", "same")],
        [*[("user", "q"), ("assistant", "a")] * 7, ("user", "last")],
    ]
]


def tokenizer_with(template: str, bos: str, eos: str, small: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small.backend_tokenizer, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def rendered(tokenizer: PreTrainedTokenizerFast, messages: Messages) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def pieces_of(tokenizer: PreTrainedTokenizerFast) -> ChatPieces:
    return chat_pieces(lambda messages: rendered(tokenizer, messages))


def conversations(family: str) -> list[Messages]:
    return [said for said in CONVERSATIONS if not (family in WITHOUT_SYSTEM and said[0]["role"] == "system")]


class TemplateError(Exception):
    """What Go's template engine ends with."""


class GoTemplate:
    """The part of Go's text/template that is used here: `if`, `else if`, `else`, `range`, variables, strings, fields,
    and the functions `eq`, `ne`, `and`, `len`, `slice`, `print`."""

    def __init__(self, source: str) -> None:
        self.tokens = self._cut(source)
        self.position = 0
        self.nodes = self._list()

    def execute(self, messages: Messages) -> str:
        """As Ollama does: the words of neighbours of the same role would be put together, which none here are."""
        system = "\n\n".join(said["content"] for said in messages if said["role"] == "system")
        self.top: Any = {
            "System": system,
            "Messages": [{"Role": said["role"], "Content": said["content"]} for said in messages],
            "Prompt": "" if len(messages) > 1 else messages[0]["content"],
        }
        self.variables: dict[str, Any] = {}
        return "".join(self._run(self.nodes, self.top))

    @staticmethod
    def _cut(source: str) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        trim, rest = False, source
        while rest:
            text, action, rest = rest.partition("{{")
            strip_before = rest.startswith("- ")
            found.append(("text", (text.lstrip() if trim else text).rstrip() if strip_before else text))
            if action:
                body = re.match(r'(?:"(?:\\.|[^"\\])*"|[^"}]|}(?!}))*', rest)
                inside, rest = rest[: body.end()], rest[body.end() + 2 :]
                trim = inside.endswith(" -")
                found.append(("action", inside.removeprefix("- ").removesuffix(" -").strip()))
        return found

    def _list(self) -> list[Any]:
        nodes: list[Any] = []
        while self.position < len(self.tokens):
            kind, value = self.tokens[self.position]
            if kind == "action" and re.match(r"(else|end)\b", value):
                break
            self.position += 1
            if kind == "text":
                nodes.append(("text", value))
            elif match := re.match(r"(if|range)\s+(.*)", value):
                nodes.append(self._branch(match[1], match[2]))
            else:
                nodes.append(("action", value))
        return nodes

    def _branch(self, kind: str, pipe: str) -> tuple[Any, ...]:
        body, otherwise = self._list(), []
        _, value = self.tokens[self.position]
        self.position += 1
        if value.startswith("else if"):
            otherwise = [self._branch("if", value.removeprefix("else if"))]
        elif value == "else":
            otherwise = self._list()
            self.position += 1
        return kind, pipe, body, otherwise

    def _run(self, nodes: list[Any], dot: Any) -> Iterator[str]:
        for node in nodes:
            match node:
                case ("text", text):
                    yield text
                case ("if", pipe, body, otherwise):
                    yield from self._run(body if self._value(pipe, dot) else otherwise, dot)
                case ("range", pipe, body, _):
                    names, _, of = pipe.partition(":=")
                    index, element = (name.strip() for name in names.split(","))
                    for number, item in enumerate(self._value(of, dot)):
                        self.variables |= {index: number, element: item}
                        yield from self._run(body, item)
                case ("action", pipe) if match := re.match(r"(\$\w+)\s*:?=\s*(.*)", pipe):
                    self.variables[match[1]] = self._value(match[2], dot)
                case ("action", pipe):
                    yield str(self._value(pipe, dot))

    def _value(self, pipe: str, dot: Any) -> Any:
        words = re.findall(r'"(?:\\.|[^"\\])*"|[()]|[^\s()]+', pipe)

        def one() -> Any:
            word = words.pop(0)
            if word == "(":
                value = call()
                assert words.pop(0) == ")"
                return value
            if word.startswith('"'):
                escaped = re.sub(r"\\U(\w{8})", lambda match: chr(int(match[1], 16)), word[1:-1])
                return re.sub(r'\\(["\\n])', lambda match: "\n" if match[1] == "n" else match[1], escaped)
            if word.isdigit():
                return int(word)
            start, *fields = word.split(".")
            value = {"": dot, "$": self.top}[start] if start in ("", "$") else self.variables[start]
            for field in filter(None, fields):
                if not isinstance(value, dict):
                    raise TemplateError(f"can't evaluate field {field} in type {type(value).__name__}")
                value = value[field]
            return value

        def call() -> Any:
            functions = {
                "eq": lambda left, right: left == right,
                "ne": lambda left, right: left != right,
                "and": lambda left, right: left and right,
                "len": len,
                "slice": lambda values, start: values[start:],
                "print": lambda *values: "".join(map(str, values)),
            }
            if words[0] not in functions:
                return one()
            function, arguments = functions[words.pop(0)], []
            while words and words[0] != ")":
                arguments.append(one())
            return function(*arguments)

        value = call()
        assert not words
        return value


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Commands and their values: in three quotation marks, in one, or bare to the end of the line. As in Ollama's
    parser, characters that cannot be printed are lost."""
    kept = "".join(character for character in text if character.isprintable() or character in "\n\t")
    pattern = re.compile(
        r'^(#|FROM |TEMPLATE |SYSTEM |PARAMETER \w+ )(?:"""(.*?)"""|"([^\n]*)"|([^\n]*))$', re.M | re.S
    )
    return [(match[1].strip(), match[2] or match[3] or match[4] or "") for match in pattern.finditer(kept)]


@pytest.mark.parametrize("family", DERIVABLE)
def test_the_go_template_writes_what_the_chat_template_writes(
    family: str, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = tokenizer_with((TEMPLATES / f"{family}.jinja").read_text(), *DERIVABLE[family], small_tokenizer)
    source = dict(read_modelfile(modelfile(pieces_of(tokenizer).to_go(), [], [])))["TEMPLATE"]
    template = GoTemplate(source)
    for messages in conversations(family):
        assert template.execute(messages) == rendered(tokenizer, messages)


@pytest.mark.slow  # compiles a Go program
def test_go_itself_writes_what_the_chat_templates_write(
    small_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Ollama's engine is Go's; what Ollama does around it is written out in the program: neighbours of one role become
    one message, and all that the system says is also in `.System`."""
    if shutil.which("go") is None:
        pytest.skip("needs Go (Debian: golang-go)")
    program = r"""
package main

import ("bytes"; "encoding/json"; "os"; "strings"; "text/template")

type message struct { Role string `json:"role"`; Content string `json:"content"` }

func main() {
    var asked []struct { Template string; Conversations [][]message }
    if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil { panic(err) }
    var written [][]string
    for _, one := range asked {
        parsed := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
        var texts []string
        for _, conversation := range one.Conversations {
            var system []string
            var collated []*message
            for i := range conversation {
                said := &conversation[i]
                if said.Role == "system" { system = append(system, said.Content) }
                if n := len(collated); n > 0 && collated[n-1].Role == said.Role {
                    collated[n-1].Content += "\n\n" + said.Content
                } else {
                    collated = append(collated, said)
                }
            }
            var out bytes.Buffer
            data := map[string]any{"System": strings.Join(system, "\n\n"), "Messages": collated, "Response": ""}
            if err := parsed.Execute(&out, data); err != nil { out.WriteString("ERROR " + err.Error()) }
            texts = append(texts, out.String())
        }
        written = append(written, texts)
    }
    json.NewEncoder(os.Stdout).Encode(written)
}
"""
    (tmp_path / "main.go").write_text(program)
    refused = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    asked, expected = [], []
    for family, tokens in DERIVABLE.items():
        tokenizer = tokenizer_with((TEMPLATES / f"{family}.jinja").read_text(), *tokens, small_tokenizer)
        said = conversations(family)
        asked.append({"Template": pieces_of(tokenizer).to_go(), "Conversations": [*said, refused]})
        expected.append([rendered(tokenizer, messages) for messages in said])
    done = subprocess.run(
        ["go", "run", "main.go"], cwd=tmp_path, input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    for family, texts, wanted in zip(DERIVABLE, json.loads(done.stdout), expected, strict=True):
        assert texts[:-1] == wanted, family
        assert ("is_not_taken_here" in texts[-1]) == (family in WITHOUT_SYSTEM), family


@pytest.mark.parametrize(
    "template", [PLAIN_CHAT_TEMPLATE, CHATML_TEMPLATE, CHATML, "{{ bos_token }}" + CHATML_TEMPLATE]
)
def test_our_own_chat_templates_can_be_written(template: str, small_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = tokenizer_with(template, *SENTENCE_PIECE, small_tokenizer)
    go = GoTemplate(pieces_of(tokenizer).to_go())
    for messages in CONVERSATIONS:
        assert go.execute(messages) == rendered(tokenizer, messages)


@pytest.mark.parametrize("family", NOT_DERIVABLE)
def test_a_template_that_is_more_than_texts_between_words_is_refused(
    family: str, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = tokenizer_with((TEMPLATES / f"{family}.jinja").read_text(), *SENTENCE_PIECE, small_tokenizer)
    with pytest.raises(ModelError, match="cannot be written as an Ollama template"):
        pieces_of(tokenizer)


LOOP = "{%% for message in messages %%}[%s{{ message.role }}]%s{%% endfor %%}"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (LOOP % ("{{ loop.index }} ", "{{ message.content }}"), "depending on more than that"),
        (LOOP % ("", "{{ message.content if message.content | length < 30 else 'long' }}"), "would become"),
        (LOOP % ("", "{{ message.content | upper }}"), "not shown as it was said"),
        (LOOP % ("", "{{ message.content }}{{ message.content }}"), "not shown as it was said"),
        (LOOP % ("", "{{ message.content }}{% if '雪' in message.content %}!{% endif %}"), "would become"),
        (
            "{{ raise_exception('no') }}",
            r"does not take a conversation of user, assistant, user, assistant, user \(no\)",
        ),
    ],
)
def test_what_depends_on_something_else_is_refused(
    template: str, why: str, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ModelError, match=why):
        pieces_of(tokenizer_with(template, *SENTENCE_PIECE, small_tokenizer))


def test_an_engine_that_puts_a_bos_gets_none_from_the_template(small_tokenizer: PreTrainedTokenizerFast) -> None:
    """Only the first: Llama 2 has one before each question."""
    llama = tokenizer_with((TEMPLATES / "llama-2.jinja").read_text(), *SENTENCE_PIECE, small_tokenizer)
    template = GoTemplate(pieces_of(llama).without_bos("<s>").to_go())
    for messages in CONVERSATIONS:
        assert "<s>" + template.execute(messages) == rendered(llama, messages)
    assert template.execute(CONVERSATIONS[2]).count("<s>") == 1
    zephyr = tokenizer_with((TEMPLATES / "zephyr.jinja").read_text(), *SENTENCE_PIECE, small_tokenizer)
    with pytest.raises(ModelError, match="'<s>' before each prompt"):
        pieces_of(zephyr).without_bos("<s>")


@pytest.mark.parametrize("family", ["gemma-2", "chatml", "mistral-v3"])
def test_roles_that_the_chat_template_does_not_take_end_in_an_error(
    family: str, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    """And never in a prompt that leaves something out."""
    tokenizer = tokenizer_with((TEMPLATES / f"{family}.jinja").read_text(), *DERIVABLE[family], small_tokenizer)
    template = GoTemplate(pieces_of(tokenizer).to_go())
    wrong = [["assistant", "user"], ["user", "tool", "user"], *([["system", "user"]] if family == "gemma-2" else [])]
    for roles in wrong:
        with pytest.raises(TemplateError, match="is_not_taken_here"):
            template.execute([{"role": role, "content": "x"} for role in roles])


def test_an_answer_that_was_begun_is_left_open(small_tokenizer: PreTrainedTokenizerFast) -> None:
    """As in Ollama's own templates: a conversation that ends with the assistant is to be continued there."""
    tokenizer = tokenizer_with(CHATML, "<|im_start|>", "<|im_end|>", small_tokenizer)
    begun = [{"role": "user", "content": "A rhyme?"}, {"role": "assistant", "content": "The old"}]
    assert GoTemplate(pieces_of(tokenizer).to_go()).execute(begun) == (
        "<|im_start|>user\nA rhyme?<|im_end|>\n<|im_start|>assistant\nThe old"
    )


@pytest.fixture
def gguf_with_bos(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A GGUF writer that writes only whether an engine is to put a BOS before a text."""

    def write_gguf(loaded: LoadedModel, file: Path, type: str, stop_ids: Sequence[int]) -> None:  # noqa: A002
        writer = GGUFWriter(file, "llama")
        writer.add_add_bos_token(request.param)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    module = ModuleType("gguf")
    module.write_gguf = write_gguf
    monkeypatch.setitem(sys.modules, "finespun.export.gguf", module)


@pytest.mark.parametrize("gguf_with_bos", [False], indirect=True)
def test_the_prompt_of_smollm2_has_the_ids_that_finespun_gives_it(
    smollm2_shared: LoadedModel, gguf_with_bos: None, tmp_path: Path
) -> None:
    encoder = Encoder(smollm2_shared.tokenizer)
    notes = write_modelfile(smollm2_shared, encoder, tmp_path, "f16")
    commands = read_modelfile((tmp_path / "Modelfile").read_text(encoding="utf-8"))
    assert ("FROM", "./model.gguf") in commands
    assert [value for command, value in commands if command == "PARAMETER stop"] == ["<|im_end|>"]
    assert ("PARAMETER temperature", "0") in commands
    assert [f" {note}" for note in notes] == [value for command, value in commands if command == "#"]
    template = GoTemplate(dict(commands)["TEMPLATE"])
    for messages in CONVERSATIONS:
        if HOSTILE not in messages[0]["content"]:  # which finespun refuses, for the special tokens in it
            text = template.execute(messages)
            ids = smollm2_shared.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids == encoder.encode_prompt(messages)


@pytest.mark.parametrize(("gguf_with_bos", "source"), [(False, "{{ .Prompt }}")], indirect=["gguf_with_bos"])
def test_a_model_that_continues_texts_gets_the_prompt_as_it_is(
    source: str, gguf_with_bos: None, tiny: LoadedModel, tmp_path: Path
) -> None:
    tiny.tokenizer.chat_template = None
    write_modelfile(tiny, Encoder(tiny.tokenizer), tmp_path, "f16")
    assert ("TEMPLATE", source) in read_modelfile((tmp_path / "Modelfile").read_text())


@pytest.mark.parametrize(
    ("gguf_with_bos", "source"),
    [(False, '{{ "<s>" }}{{ .Prompt }}'), (True, "{{ .Prompt }}")],
    indirect=["gguf_with_bos"],
)
def test_a_bos_before_a_raw_prompt_comes_from_the_engine_or_the_template(
    source: str, gguf_with_bos: None, tiny: LoadedModel, tmp_path: Path
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    write_modelfile(tiny, Encoder(tokenizer), tmp_path, "f16")
    assert ("TEMPLATE", source) in read_modelfile((tmp_path / "Modelfile").read_text())


def test_what_a_go_template_cannot_do_is_said(small_tokenizer: PreTrainedTokenizerFast) -> None:
    from finespun.export.ollama import _notes

    def notes_of(family: str) -> str:
        tokenizer = tokenizer_with((TEMPLATES / f"{family}.jinja").read_text(), *DERIVABLE[family], small_tokenizer)
        return " ".join(_notes(tokenizer, pieces_of(tokenizer)))

    assert notes_of("chatml") == ""
    assert "white space" in notes_of("llama-3.1")
    assert "knows tools" in notes_of("llama-3.1")
    assert "thoughts" in notes_of("qwen3")
    assert "no system message" in notes_of("gemma-2")
