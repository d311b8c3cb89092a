"""Ollama: a folder from which `ollama create` makes a model that is prompted as finespun prompts it.

Ollama's templates are Go's (https://pkg.go.dev/text/template, https://docs.ollama.com/modelfile) and cannot be computed
from Jinja's. But nearly all chat templates write fixed texts between the words of a conversation, which depend only on
who spoke before and who speaks next. These texts are found by rendering conversations of marked words; then other
conversations are rendered both ways, and a chat template that is not reproduced byte for byte is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from finespun.data.templates import Encoder
from finespun.errors import ModelError
from finespun.export.settings import Quantization
from finespun.files import write_text
from finespun.models.load import LoadedModel

Roles = tuple[str, ...]
Render = Callable[[list[dict[str, str]]], str]

_CONVERSATIONS: list[list[str]] = [
    [*system, *["user", "assistant"] * turns, "user"] for system in ([], ["system"]) for turns in (2, 0, 1, 3)
]
"""Who speaks, in conversations that wait for an answer."""

_PROBES = (
    "Why is the sea salty?",
    "Zwei Zeilen,\n\nmit Abstand – und \t Umlauten: äöü",
    '{{ .Content }} {% raw %} "quoted" \\n </s> `code`',
    "雪",
    "🙂🙂 <b>&amp;</b> 'it' = 100 % [INST]",
)


@dataclass(frozen=True)
class ChatPieces:
    """What a chat template writes around the words of a conversation.

    `between` has the text in front of each message by the roles that it stands between, from "start" to "end":
    `("user", "assistant")` → one text. Where the system's words stand before the last question instead of at the
    beginning, `("assistant", "system", "user")` → two texts, around them. No key has a role that the template refuses.
    """

    between: Mapping[Roles, tuple[str, ...]]

    @property
    def takes_system(self) -> bool:
        return any("system" in roles for roles in self.between)

    @property
    def system_last(self) -> bool:
        """Whether the system's words stand before the last question."""
        return any(len(roles) == 3 for roles in self.between)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for an answer to `messages`. Raises `KeyError` for roles that the template does not take."""
        text = ""
        for roles, words in _steps(messages, self.system_last):
            text += "".join(map(str.__add__, self.between[roles], words or [""]))
        return text

    def without_bos(self, bos: str) -> ChatPieces:
        """The same for an engine that puts `bos` in front by itself. Raises `ModelError` where none stands there."""
        between = dict(self.between)
        for roles, texts in self.between.items():
            if roles[0] == "start":
                if not texts[0].startswith(bos):
                    raise ModelError(
                        f"Ollama would put {bos!r} before each prompt, since the tokenizer does so with a text, but "
                        "the chat template has none there. Use --to gguf with an engine that can leave it out."
                    )
                between[roles] = (texts[0][len(bos) :], *texts[1:])
        return ChatPieces(between)

    def to_go(self) -> str:
        """The Go template. Roles that the chat template does not take end in an error instead of a wrong prompt."""
        lines = ['{{- $before := "start" }}', "{{- range $i, $_ := .Messages }}"]
        if self.system_last:
            lines += ['{{- if ne .Role "system" }}', '{{- $step := print $before " " .Role }}']
            lines += [
                "{{- if and $.System (eq (len (slice $.Messages $i)) 1) }}"
                '{{- $step = print $before " system " .Role }}{{- end }}'
            ]
        else:
            lines += ['{{- $step := print $before " " .Role }}']
        word = "if"
        for roles, texts in self.between.items():
            if roles[-1] != "end":
                pieces = "{{ $.System }}".join(_go_text(text) for text in texts)
                lines.append(f'{{{{- {word} eq $step "{" ".join(roles)}" }}}}{pieces}')
                word = "else if"
        lines += ["{{- else }}{{ .Role.is_not_taken_here_by_the_chat_template }}", "{{- end }}"]
        lines += ["{{- .Content }}", "{{- $before = .Role }}"]
        lines += ["{{- end }}"] * (2 if self.system_last else 1)
        lines += ['{{- if eq $before "user" }}' + _go_text(self.between["user", "end"][0]) + "{{ end }}"]
        return "\n".join(lines)


def chat_pieces(render: Render) -> ChatPieces:
    """What the chat template behind `render` writes around the words of a conversation. Raises `ModelError` where that
    cannot be said by the roles of neighbours alone, or where it does not render other conversations as `render` does.
    """
    marked = {tuple(roles): _messages(roles, (f"Word{number}word" for number in range(9))) for roles in _CONVERSATIONS}
    texts = {roles: text for roles, messages in marked.items() if (text := _rendered(render, messages)) is not None}
    longest = texts.get(("system", "user", "assistant", "user"), "")
    system_last = 0 <= longest.find("Word1word") < longest.find("Word0word")
    between: dict[Roles, tuple[str, ...]] = {}
    for conversation, text in texts.items():
        rest = text
        for roles, words in _steps(marked[conversation], system_last):
            pieces = []
            for word in words:
                piece, found, rest = rest.partition(word)
                if not found or text.count(word) != 1:
                    raise _refusal(f"a conversation of {', '.join(conversation)} is not shown as it was said")
                pieces.append(piece)
            _learn(between, roles, pieces or [rest])
    found = ChatPieces(between)
    _verify(found, render)
    return found


def write_modelfile(loaded: LoadedModel, encoder: Encoder, folder: Path, gguf_type: Quantization) -> list[str]:
    """Writes `model.gguf` and the `Modelfile` for it into `folder`; returns what a person has to know about it.

    `loaded` has no adapter. Raises `ModelError` for a chat template that Ollama cannot reproduce, before anything is
    written, and for what GGUF does not know.
    """
    from gguf import GGUFReader

    from finespun.export.gguf import write_gguf

    tokenizer = encoder.tokenizer
    pieces = chat_pieces(_renderer(tokenizer)) if encoder.prompt_format == "chat" else None
    notes = _notes(tokenizer, pieces) if pieces else []
    file = folder / "model.gguf"
    write_gguf(loaded, file, gguf_type, encoder.stop_ids)
    field = GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    bos = str(tokenizer.bos_token) if field is not None and field.contents() else ""
    template = pieces.without_bos(bos).to_go() if pieces else _raw_template(encoder, bos)
    stops = [encoder.decode([token], skip_special_tokens=False) for token in encoder.stop_ids]
    write_text(folder / "Modelfile", modelfile(template, stops, notes))
    return notes


def modelfile(template: str, stops: Sequence[str], notes: Sequence[str]) -> str:
    """A Modelfile for `model.gguf` beside it, which writes greedily, as finespun does unless it is told otherwise."""
    lines = [f"# {note}" for note in notes]
    lines += ["FROM ./model.gguf", f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    return "\n".join(lines) + "\n"


def _steps(messages: Sequence[Mapping[str, str]], system_last: bool) -> Iterator[tuple[Roles, list[str]]]:
    """For each message, and for the end, the roles on both sides of what stands before it, and the words that follow:
    with the system's, where they move to the last question."""
    system = messages[0]["content"] if system_last and messages[0]["role"] == "system" else None
    said = messages[1:] if system is not None else messages
    before = "start"
    for number, message in enumerate(said, 1):
        role, words = message["role"], message["content"]
        if system is not None and number == len(said):
            yield (before, "system", role), [system, words]
        else:
            yield (before, role), [words]
        before = role
    yield (before, "end"), []


def _messages(roles: Sequence[str], words: Iterator[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": next(words)} for role in roles]


def _rendered(render: Render, messages: list[dict[str, str]]) -> str | None:
    """None where the template takes no system message or leaves it out, which finespun refuses as well."""
    try:
        text = render(messages)
    except Exception as error:  # a template can raise anything that the expressions in it can
        if messages[0]["role"] == "system":
            return None
        roles = ", ".join(message["role"] for message in messages)
        raise _refusal(f"it does not take a conversation of {roles} ({error})") from None
    return None if messages[0]["role"] == "system" and messages[0]["content"] not in text else text


def _learn(between: dict[Roles, tuple[str, ...]], roles: Roles, pieces: Sequence[str]) -> None:
    known = between.setdefault(roles, tuple(pieces))
    if known != tuple(pieces):
        raise _refusal(
            f"between {' and '.join(roles)} it writes {known} or {tuple(pieces)}, depending on more than that"
        )


def _verify(pieces: ChatPieces, render: Render) -> None:
    """Compares other conversations than those that `pieces` were found in."""
    long = [*["user", "assistant"] * 6, "user"]
    for start in range(len(_PROBES)):
        for roles in [*_CONVERSATIONS, long, ["system", *long]]:
            if roles[0] == "system" and not pieces.takes_system:
                continue
            messages = _messages(roles, islice(cycle(_PROBES), start, None))
            expected, found = _rendered(render, messages), pieces.render(messages)
            if found != expected:
                raise _refusal(f"{messages} becomes {expected!r}, and would become {found!r}")


def _refusal(why: str) -> ModelError:
    return ModelError(
        f"The chat template of this model cannot be written as an Ollama template: {why}. Use --to gguf, which carries "
        "the chat template itself, or train with another data.chat_template."
    )


def _renderer(tokenizer: Any) -> Render:
    def render(messages: list[dict[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    return render


def _raw_template(encoder: Encoder, engine_bos: str) -> str:
    """For a model that continues texts."""
    tokenizer = encoder.tokenizer
    ours = str(tokenizer.bos_token) if encoder.encode_prompt("x")[0] == tokenizer.bos_token_id else ""
    if engine_bos and not ours:
        raise ModelError(f"Ollama would put {engine_bos!r} before each prompt, which finespun does not.")
    return _go_text(ours if not engine_bos else "") + "{{ .Prompt }}"


def _notes(tokenizer: Any, pieces: ChatPieces) -> list[str]:
    """What the chat template does that a Go template cannot, or not always, for people who write a client."""
    render, template = _renderer(tokenizer), tokenizer.get_chat_template()
    again = _messages(["user", "assistant", "user"], iter(["a", "<think>t</think>b", "c"]))
    notes = []
    if render([{"role": "user", "content": " a "}]) == render([{"role": "user", "content": "a"}]):
        notes.append("The chat template strips white space around what is said; Ollama does not: send it stripped.")
    if render(again) != pieces.render(again):
        notes.append("The chat template leaves thoughts out of earlier answers; Ollama does not: send them without.")
    if not pieces.takes_system:
        notes.append("The chat template takes no system message; with one, Ollama ends in an error.")
    if "strftime_now" in template:
        notes.append("The chat template tells the date; here it is always the day of the export.")
    if "tools" in template:
        notes.append("The chat template knows tools; this one does not.")
    return notes


def _go_text(text: str) -> str:
    """An action that writes `text`; nothing for none. Ollama's parser drops what cannot be printed, so that is escaped.
    A line never holds three quotation marks, which would end the template."""
    return f'{{{{ "{"".join(map(_go_character, text))}" }}}}' if text else ""


def _go_character(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character == "\n":
        return "\\n"
    return character if character.isprintable() else f"\\U{ord(character):08x}"
