"""A tokenizer as llama.cpp knows it: tokens, their kinds, merges or scores, and which of them begin and end a text.

What the tokenizer does is read from its own description (the `tokenizers` JSON). llama.cpp knows two kinds that matter
here: byte-level BPE, whose way of splitting a text into words has a name, and the BPE of SentencePiece, which merges by
the scores of tokens. A tokenizer that is neither is refused, since llama.cpp would silently tokenize otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from finespun.data.templates import Encoder
from finespun.errors import ModelError

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_CASED_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

_LLAMA_3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_OTHER}|{_REST}"
_QWEN_2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_OTHER}|{_REST}"
_QWEN_35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}"
)
_TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}|{_CASED_OTHER}|{_REST}"
_GPT_4O = rf"{_CASED % (f'{_CONTRACTION}?', f'{_CONTRACTION}?')}|\p{{N}}{{1,3}}|{_CASED_OTHER}|{_REST}"

_GPT_2 = "GPT-2's words"
_DIGITS = "single digits"

_PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT_2,), False): "gpt-2",
    ((_DIGITS, _GPT_2), False): "smollm",
    ((_QWEN_2,), False): "qwen2",
    ((_QWEN_35,), False): "qwen35",
    ((_LLAMA_3,), True): "llama-bpe",
    ((_LLAMA_3,), False): "smaug-bpe",
    ((_TEKKEN,), True): "tekken",
    ((_GPT_4O,), False): "gpt-4o",
}
"""How a text is split, and whether a word that is a token needs no merges → what llama.cpp calls that. For "tekken" and
"gpt-4o" llama.cpp leaves out combining marks (those of Devanagari, for one), and splits words there."""

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def write_vocabulary(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, stop_ids: Sequence[int]
) -> None:
    """Describes `tokenizer` in the file that `writer` writes, for a model with `rows` embeddings, of which those beyond
    the tokenizer get names that no text has. Each of `stop_ids` ends a text. Raises `ModelError` for a tokenizer that
    llama.cpp does not know."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"The tokenizer of {tokenizer.name_or_path} is not one of the `tokenizers` library.")
    description = json.loads(backend.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"A {model['type']} tokenizer cannot be written as GGUF; byte-level BPE and SentencePiece BPE can."
        )
    added = {token["id"]: token for token in description["added_tokens"]}
    tokens = {number: text for text, number in model["vocab"].items()}
    tokens |= {number: token["content"] for number, token in added.items()}
    if max(tokens) >= rows:
        raise ModelError(
            f"The tokenizer has {max(tokens) + 1} tokens, the model embeddings for {rows} only. They do not belong "
            "together."
        )
    names = [tokens.get(number, f"[PAD{number}]") for number in range(rows)]
    kinds = [_kind(number, tokens, added, model) for number in range(rows)]
    if model["byte_fallback"]:
        _write_sentencepiece(writer, tokenizer, description, names, kinds)
    else:
        _write_byte_level(writer, description)
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    _write_special(writer, tokenizer, stop_ids)


def strips_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether special tokens swallow white space behind them, as those of Phi-3 do."""
    return any(token.rstrip for token in tokenizer.added_tokens_decoder.values())


def _kind(number: int, tokens: dict[int, str], added: dict[int, dict[str, Any]], model: dict[str, Any]) -> TokenType:
    if number not in tokens:
        return TokenType.UNUSED
    if model["byte_fallback"] and tokens[number] == model["unk_token"]:
        return TokenType.UNKNOWN
    if number in added:
        return TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
    return TokenType.BYTE if model["byte_fallback"] and _BYTE.fullmatch(tokens[number]) else TokenType.NORMAL


def _write_byte_level(writer: GGUFWriter, description: dict[str, Any]) -> None:
    model, normalizer = description["model"], description["normalizer"]
    # NFC is what Qwen's tokenizers do; llama.cpp leaves it to the text, which nearly always is in that form
    if normalizer is not None and normalizer["type"] != "NFC":
        raise ModelError(
            f"llama.cpp has no {normalizer['type']} normalizer for byte-level BPE, which this model needs."
        )
    splits = tuple(_splits(description["pre_tokenizer"]))
    name = _PRE_TOKENIZERS.get((splits, model["ignore_merges"]))
    if name is None:
        raise ModelError(
            "The tokenizer splits texts in a way that has no name in llama.cpp, so it would see other tokens: "
            f"{' then '.join(splits) or 'not at all'}. The model can be used as a folder (--to merged or hf)."
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])


def _splits(step: dict[str, Any] | None) -> list[str]:
    """A pre-tokenizer as the list of its splits; the mapping of bytes to characters alone is no split."""
    match step:
        case None:
            return []
        case {"type": "Sequence", "pretokenizers": steps}:
            return [split for inner in steps for split in _splits(inner)]
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return [_GPT_2] if use_regex else []
        case {"type": "Digits", "individual_digits": True}:
            return [_DIGITS]
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return [pattern]
        case _:
            return [json.dumps(step, ensure_ascii=False)]


def _write_sentencepiece(
    writer: GGUFWriter,
    tokenizer: PreTrainedTokenizerBase,
    description: dict[str, Any],
    names: list[str],
    kinds: list[TokenType],
) -> None:
    """SentencePiece merges, of all neighbours that make a token, those of the highest score first: the order in which
    tokens appear in the merges."""
    steps = [*_steps(description["normalizer"]), *_steps(description["pre_tokenizer"])]
    if unknown := [step for step in steps if not _is_sentencepiece(step)]:
        raise ModelError(
            "llama.cpp's SentencePiece does not do what this tokenizer does with a text: "
            f"{', '.join(json.dumps(step, ensure_ascii=False) for step in unknown)}."
        )
    prepends = any(step["type"] == "Prepend" for step in steps)
    for token in description["added_tokens"]:
        if prepends and token["normalized"]:
            raise ModelError(
                f"The added token {token['content']!r} is normalized like words, which llama.cpp cannot do. Add it "
                "with normalized=False."
            )
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in description["model"]["merges"]]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    normal = {name for name, kind in zip(names, kinds, strict=True) if kind == TokenType.NORMAL}
    _refuse_missing_merges(normal, set(merges))
    lowest = float(len(merges) + 1)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    scores = {name: -float(ranks.get(name, lowest)) for name in normal}
    writer.add_token_scores([scores.get(name, -lowest) for name in names])
    writer.add_add_space_prefix(_adds_space(tokenizer, steps))


def _refuse_missing_merges(names: set[str], merges: set[tuple[str, ...]]) -> None:
    """Raises `ModelError` where neighbours make a token that the tokenizer would not merge but SentencePiece would."""
    for token in names:
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in names and right in names and (left, right) not in merges:
                raise ModelError(
                    f"This tokenizer does not merge {left!r} and {right!r} to its token {token!r}. llama.cpp's "
                    "SentencePiece BPE would, and so would see other tokens."
                )


def _adds_space(tokenizer: PreTrainedTokenizerBase, steps: list[dict[str, Any]]) -> bool:
    """Whether llama.cpp shall put a space before a text and behind each special token. The normalizer Prepend does
    that; Metaspace does not before a space, and with the scheme "first" not behind special tokens. For a chat model
    what its template puts behind special tokens decides, else what begins a text."""
    if any(step["type"] == "Prepend" for step in steps):
        return True
    scheme = next((step["prepend_scheme"] for step in steps if step["type"] == "Metaspace"), "never")
    if scheme == "never" or not tokenizer.chat_template:
        return scheme != "never"
    asked = [{"role": "user", "content": "a"}]
    prompt = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    special = "|".join(re.escape(token.content) for token in tokenizer.added_tokens_decoder.values())
    return scheme == "always" and not any(part.startswith(" ") for part in re.split(special, prompt))


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [part for inner in step.get("normalizers", step.get("pretokenizers")) for part in _steps(inner)]
    return [step]


def _is_sentencepiece(step: dict[str, Any]) -> bool:
    match step:
        case {"type": "Prepend", "prepend": space} | {"type": "Replace", "pattern": {"String": " "}, "content": space}:
            return space == _SPACE
        case {"type": "Metaspace", "replacement": space, "split": False}:
            return space == _SPACE
        case {"type": "Split", "pattern": {"String": " "}}:
            return True  # Gemma's, which finds nothing any more once spaces have been replaced
        case _:
            return False


def _write_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    others = [token for token in dict.fromkeys(stop_ids) if token != eos]
    # GGUF has three places for a token that ends a text: of the text, of a turn, of a message that is not the last
    if len(others) > 2:
        stops = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in stop_ids)
        raise ModelError(f"GGUF has room for three tokens that end a text; this model has more: {stops}.")
    add = [writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id]
    for write, token in zip(add, [eos, *others], strict=False):
        write(token)
    if bos is not None:
        writer.add_bos_token_id(bos)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    ids = list(tokenizer("x")["input_ids"])
    begins = bos is not None and ids[0] == bos
    if begins and tokenizer.chat_template:  # a tokenizer may put one before texts, its template none before a chat
        begins = Encoder(tokenizer).encode_prompt("x")[0] == bos
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == eos)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.get_chat_template())
