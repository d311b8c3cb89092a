"""What can be wrong with a text, seen from the text alone. Strings only: no files, models, tokens or examples.

Hashes come from BLAKE2 and never from `hash()`, so that results are the same in every process.
"""

from __future__ import annotations

import math
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import groupby
from typing import Any

import numpy as np

from finespun.errors import DataError

# Below this many units a text says too little to be compared by parts of it.
_FEW_UNITS = 5

# Scripts that put no space between words: Thai, Lao, Myanmar, Hangul jamo, Khmer, Tai Le, New Tai Lue, Tai Tham,
# Balinese, Javanese, Tai Viet, kana, ideographs; and Hangul syllables.
_UNSPACED = (
    "[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\ua980-\ua9ff"
    "\uaa60-\uaadf\u3005-\u3007\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3"
    "\uf900-\ufaff]"
)
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff]")


@lru_cache(maxsize=1)
def _unit_pattern() -> re.Pattern[str]:
    # `\w` leaves out the combining marks that Indic and Thai vowels are written with, and a negated class is five times
    # slower than one that names all it holds. Beyond the basic plane whole blocks do.
    unspaced = re.compile(_UNSPACED)

    def kind(character: str) -> str:
        if character.isalnum():
            return "alone" if unspaced.match(character) else "in a run"
        return "mark" if unicodedata.category(character)[0] == "M" else "none"

    classes = {
        "in a run": "\U00010000-\U0001afff\U0001e000-\U0001efff",
        "alone": "\U0001b000-\U0001b16f\U00020000-\U0003ffff",
    }
    for name, run in groupby(map(chr, range(0x10000)), kind):
        first, *others = run
        classes[name] = classes.get(name, "") + f"{first}-{others[-1] if others else first}"
    run, alone, mark = classes["in a run"], classes["alone"], classes["mark"]
    return re.compile(f"[{run}][{run}{mark}]*|[{alone}][{mark}]*")


def units(text: str) -> list[str]:
    """What a text is counted and compared by, in any language, after NFKC and case folding.

    A unit is a run of letters and digits with their combining marks; in scripts that put no space between words
    (Chinese, Japanese, Thai and the like), and in Hangul, each character. Punctuation, symbols and emoji are dropped.
    """
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return _unit_pattern().findall(folded)


class _Hashes(dict[str, int]):
    """64-bit hashes of units, computed when asked for; frequent units are found again."""

    def __missing__(self, unit: str) -> int:
        value = int.from_bytes(blake2b(unit.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        if len(unit) <= 32:
            if len(self) >= 2**18:
                self.clear()
            self[unit] = value
        return value


_hashes = _Hashes()


# The odd base of a polynomial modulo 2^64, which keeps every bit of the hashes that it multiplies.
_BASE = np.uint64(0x9E3779B97F4A7C15)


def ngram_hashes(of: Sequence[str], longest: int) -> list[np.ndarray]:
    """For n = 1 to `longest`, as far as there are units: a hash of every n successive units, `[units - n + 1]`."""
    hashes = np.fromiter(map(_hashes.__getitem__, of), np.uint64, len(of))
    grams = [hashes] if of else []
    for n in range(2, min(longest, len(of)) + 1):
        sums = grams[-1][:-1] * _BASE
        sums += hashes[n - 1 :]
        grams.append(sums)
    return grams


class NearDuplicates:
    """Finds texts that are nearly the same as an earlier one, as they stream by (MinHash with LSH, Broder 1997).

    Two texts are alike when the Jaccard similarity of their sets of shingles (3 successive units) is estimated at or
    above `threshold`; with 128 permutations the estimate has a standard error of at most 0.044. A pair right at the
    threshold is looked at with probability 0.9 or more, one a little above it nearly always. Texts of fewer than 5
    units are alike only with equal units, those without any only as equal strings. Memory for each text that is kept,
    whatever its length: about 1.7 kB with 128 permutations and a threshold of 0.8.
    """

    def __init__(self, threshold: float = 0.8, permutations: int = 128) -> None:
        if not 0 < threshold <= 1:
            raise DataError(f"The threshold of near-duplicates is {threshold}; give one above 0 and at most 1.")
        if permutations < 1:
            raise DataError(f"The number of MinHash permutations is {permutations}; give at least 1, or leave 128.")
        from rensa import RMinHash, RMinHashDeduplicator  # ty: ignore[missing-module-member]  (it has no stubs)

        # More rows in a band spare comparisons of unlike texts, but let more alike ones pass unseen.
        rows = max(
            rows
            for rows in range(1, permutations + 1)
            if permutations % rows == 0 and (rows == 1 or (1 - threshold**rows) ** (permutations // rows) <= 0.1)
        )
        self._sketch = lambda: RMinHash(permutations, 42)
        self._sketches = RMinHashDeduplicator(threshold, permutations, True, permutations // rows, 42)
        self._keys = array("q")
        self._short: dict[str, int] = {}

    def first_like(self, text: str, key: int) -> int | None:
        """The key of the earliest text that this one is like; if there is none, None, and `key` (64 bits) is kept."""
        parts = units(text)
        if len(parts) < _FEW_UNITS:
            # A unit holds no space, so a text without units, kept with one in front, is no other's units.
            whole = " ".join(parts) or " " + text.strip()
            earlier = self._short.get(whole)
            if earlier is None:
                self._short[whole] = key
            return earlier
        sketch = self._sketch()
        sketch.update(ngram_hashes(parts, 3)[-1].view("V8").tolist())
        alike = self._sketches.get_duplicates(sketch)
        if alike:
            return self._keys[min(map(int, alike))]
        self._sketches.add(str(len(self._keys)), sketch)
        self._keys.append(key)
        return None


class NearDuplicateExamples:
    """As `NearDuplicates`, for prompts with answers: two are alike when they are as a whole and their answers are by
    themselves. Under a long prompt that many rows share, rows with different answers are no duplicates."""

    def __init__(self) -> None:
        self._wholes, self._answers = NearDuplicates(), NearDuplicates()

    def first_like(self, prompt: str, answer: str, key: int) -> int | None:
        """The key of the earliest example that this one is like, as far as can be told; if there is none, None, and
        `key`, which must be higher than all before, is kept. A text that is all answer has an empty `prompt`."""
        whole = self._wholes.first_like(f"{prompt}\n{answer}", key)
        if not prompt:
            return whole
        same_answer = self._answers.first_like(answer, key)
        return None if whole is None or same_answer is None else max(whole, same_answer)


def is_single_word(text: str) -> bool:
    """Whether a text is one word, or one or two characters where words are not divided."""
    if len(text) > 80:
        return False
    parts = units(text)
    return len(parts) <= 1 or (len(parts) == 2 and all(_CJK.fullmatch(part) for part in parts))


def is_echo(prompt: str, answer: str) -> bool:
    """Whether an answer says only what was asked."""
    return bool(prompt) and answer.strip() == prompt.strip()


class Overlap:
    """How much of held-out texts occurs in training texts: n-grams of units, 13 as in GPT-3 (Brown et al. 2020, C).

    A held-out text of fewer than `n` units but 5 or more is one n-gram as a whole; a shorter one has none. Only what
    is held out is kept in memory, some 25 bytes for each of its units; training texts stream by.
    """

    def __init__(self, held_out: Iterable[str], n: int = 13) -> None:
        if n < 1:
            raise DataError(f"Overlap is counted in n-grams of at least 1 unit; n is {n}.")
        self._n = n
        grams, self._lengths = [], set[int]()
        for text in held_out:
            parts = units(text)
            if len(parts) >= min(n, _FEW_UNITS):
                self._lengths.add(min(n, len(parts)))
                grams.append(ngram_hashes(parts, n)[-1])
            else:
                grams.append(np.zeros(0, np.uint64))
        self._ends = np.cumsum([len(gram) for gram in grams], dtype=np.int64)
        every = np.concatenate([*grams, np.zeros(0, np.uint64)])
        self._known, self._gram = np.unique(every, return_inverse=True)
        self._seen = np.zeros(len(self._known), bool)
        # Most n-grams of a training text are in no held-out one. A table by their highest bits tells most of them so
        # without a search: 4 to 8 places for each known n-gram.
        bits = max(len(self._known) * 4, 1).bit_length()
        self._shift = np.uint64(64 - bits)
        self._possible = np.zeros(1 << bits, bool)
        self._possible[self._known >> self._shift] = True

    def add(self, text: str) -> None:
        """Takes note of a training text."""
        grams = enumerate(ngram_hashes(units(text), max(self._lengths, default=0)), start=1)
        comparable = [hashes for length, hashes in grams if length in self._lengths]
        if comparable:
            hashes = np.concatenate(comparable)
            hashes = hashes[self._possible[hashes >> self._shift]]
            places = np.searchsorted(self._known, hashes)
            places[places == len(self._known)] = 0
            self._seen[places[self._known[places] == hashes]] = True

    def shares(self) -> list[float]:
        """For each held-out text the share of its n-grams that occurred so far, 0 to 1; 0 for one without n-grams."""
        hits = np.concatenate([[0], np.cumsum(self._seen[self._gram])])
        starts = np.concatenate([[0], self._ends[:-1]])[: len(self._ends)]
        return ((hits[self._ends] - hits[starts]) / np.maximum(self._ends - starts, 1)).tolist()


@dataclass(frozen=True)
class Found:
    """A piece of personal data: `text[start:end]`."""

    kind: str
    start: int
    end: int


# Patterns are bounded or leave one way to match, and do not start inside what they could have started before: a text
# made to be slow takes time in proportion to its length. ASCII throughout: a phone number may follow 电话 directly.
_EMAIL = re.compile(
    r"(?<![\w%+@-])[\w%+-][\w.%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}"
    # What looks like a top-level domain may be a file name's end, as in icon@2x.png.
    r"(?!(?:png|jpe?g|gif|svg|webp|avif|css|js|ts|json|html?|py|md)\b)[A-Za-z]{2,24}(?!\w)",
    re.ASCII,
)
# Seven digits with at most some separators between: nothing below has fewer.
_DIGITS = re.compile(r"\d(?:[ \u00a0().\-/]{0,3}\d){6,}", re.ASCII)
_IDENTITY = re.compile(
    r"(?<!\w)[1-9]\d{5}(?:18|19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\w)", re.ASCII
)
_CARD = re.compile(
    r"(?<![\w.])(?:\d{13,19}|(\d{4}([ -])\d{4}\2\d{4}\2\d{4})(?:\2\d{1,3})?|\d{4}([ -])\d{6}\3\d{4,5})(?!\w|\.\d)",
    re.ASCII,
)
_NORTH_AMERICAN = re.compile(
    r"(?<![\w.+/-])(?:\+1[-. ]?(?:\([2-9]\d\d\)|[2-9]\d\d)[-. ]?[2-9]\d\d[-. ]?"
    r"|(?:1[-. ])?(?:\([2-9]\d\d\)[ -]?[2-9]\d\d[-. ]|[2-9]\d\d(?:([-.])[2-9]\d\d\1| [2-9]\d\d-)))"
    r"\d{4}(?![0-9A-WYZa-wyz_]|[-./]\d)",
    re.ASCII,
)
_CHINESE_MOBILE = re.compile(
    r"(?<![\w.+/$€£¥-])(?:(?:\+|00)?86[ -]?)?1[3-9]\d(?!\d{2}0{6})(?:[ -]?\d{4}){2}(?!\w|[.,-]\d|%)", re.ASCII
)
_INTERNATIONAL = re.compile(r"(?<![\w.,+])\+\d(?:[ \u00a0().\-/]{0,2}\d){7,15}(?!\w)", re.ASCII)
_COUNTRY = re.compile(
    r"7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]"
    r"|2[1-689]\d|3[578]\d|42\d|5[09]\d|6[789]\d|8[058]\d|9[679]\d"
)
_ISSUERS = (
    (re.compile(r"4"), (13, 16, 19)),  # Visa
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), (16,)),  # Mastercard
    (re.compile(r"3[47]"), (15,)),  # American Express
    (re.compile(r"30[0-5]|3[68]"), (14,)),  # Diners Club
    (re.compile(r"6011|64[4-9]|65|62|35(?:2[89]|[3-8])"), (16, 17, 18, 19)),  # Discover, UnionPay, JCB
)

_KEY = r"[A-Za-z0-9_-]"
# What each sort of secret begins with and how it goes on.
_SECRETS = {
    start: re.compile(re.escape(start) + rf"(?<!{_KEY}{re.escape(start)})" + rest)
    for starts, rest in (
        (("AKIA", "ASIA"), r"[A-Z2-7]{16}(?![A-Za-z0-9])"),  # Amazon
        (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"[A-Za-z0-9]{36,255}"),  # GitHub
        (("github_pat_",), r"[A-Za-z0-9_]{22,255}"),
        (("glpat-",), _KEY + r"{20,255}"),  # GitLab
        (("xox",), r"[abeoprs]-[A-Za-z0-9-]{10,255}"),  # Slack
        (("sk-",), rf"(?:(?:ant|proj|svcacct|admin|or)-{_KEY}{{20,255}}|[A-Za-z0-9]{{20,255}})"),  # Anthropic, OpenAI
        (("AIza",), _KEY + rf"{{35}}(?!{_KEY})"),  # Google
        (("GOCSPX-",), _KEY + r"{28}"),
        (("hf_",), r"[A-Za-z0-9]{30,64}"),  # Hugging Face
        (("sk_live_", "sk_test_", "rk_live_", "rk_test_", "whsec_"), r"[A-Za-z0-9]{16,255}"),  # Stripe
        (("eyJ",), rf"{_KEY}{{8,}}\.eyJ{_KEY}{{8,}}\.{_KEY}{{8,}}"),  # JSON Web Token
    )
    for start in starts
}
_PRIVATE_KEY = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,16} ){0,4}PRIVATE KEY(?: BLOCK)?-----")
_ASSIGNMENT = re.compile(
    r"(?:passw(?:or)?d|pwd|secret|token|credential|(?:api|access|private|secret|auth)[_-]?key)s?"
    r"[\"']?\s{0,3}(?::=|=>|[=:])\s{0,3}(?:\"([!#-~]{8,255})\"|'([!-&(-~]{8,255})'|([\w+/.~!@#%^&*=-]{8,255})(?![(\[]))",
    re.ASCII | re.IGNORECASE,
)
_STAND_IN = re.compile(r"your|example|change|placeholder|dummy|xxx|\*\*\*|\.\.\.|\$\{|\{\{|<", re.IGNORECASE)


def _random_looking(value: str) -> bool:
    """Whether a value mixes letters and digits with an entropy of 3 bits a character or more, and is no stand-in."""
    if not (re.search(r"[A-Za-z]", value) and re.search(r"[0-9]", value)) or _STAND_IN.search(value):
        return False
    shares = [count / len(value) for count in Counter(value).values()]
    return -sum(share * math.log2(share) for share in shares) >= 3


def _secrets(text: str) -> Iterator[tuple[int, int]]:
    for start, pattern in _SECRETS.items():
        if start in text:
            for match in pattern.finditer(text):
                # `sk-` may begin plain words.
                if start != "sk-" or _random_looking(match[0]):
                    yield match.span()
    if "PRIVATE KEY" in text:
        yield from (match.span() for match in _PRIVATE_KEY.finditer(text))
    lowered = text.lower()
    if any(word in lowered for word in ("passw", "pwd", "secret", "token", "credential", "key")):
        for match in _ASSIGNMENT.finditer(text):
            if _random_looking(match[match.lastindex or 0]):
                yield match.span(match.lastindex or 0)


def _is_identity(digits: str) -> bool:
    """The check character of GB 11643-1999."""
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    return "10X98765432"[sum(int(d) * w for d, w in zip(digits, weights, strict=False)) % 11] == digits[17].upper()


def _is_card(digits: str) -> bool:
    """An issuer's prefix and length, and the check digit of Luhn (ISO/IEC 7812)."""
    if not any(prefix.match(digits) and len(digits) in lengths for prefix, lengths in _ISSUERS):
        return False
    doubled = digits[-2::-2].translate(str.maketrans("0123456789", "0246813579"))
    return sum(map(int, digits[::-2] + doubled)) % 10 == 0


def _is_international(number: str) -> bool:
    """A country's code and a national number in the lengths of E.164; +1 is told by its form."""
    digits = re.sub(r"\D", "", number.replace("(0)", ""))
    country = _COUNTRY.match(digits)
    if not country or not 9 <= len(digits) <= 15:
        return False
    return digits[country.end()] != "0" or country[0] == "39"


def _numbers(text: str, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """What the digits in `text[start:end]` are; the most certain first."""
    if end - start >= 13:
        for match in _IDENTITY.finditer(text, start, end):
            if _is_identity(match[0]):
                yield "identity number", *match.span()
        for match in _CARD.finditer(text, start, end):
            # Up to three more digits belong to a card of 19, or are what stands next to one of 16.
            for group in (0, 1) if match[1] else (0,):
                if _is_card(match[group].replace(" ", "").replace("-", "")):
                    yield "card number", *match.span(group)
                    break
    for pattern in (_NORTH_AMERICAN, _CHINESE_MOBILE):
        yield from (("phone number", *match.span()) for match in pattern.finditer(text, start, end))
    for match in _INTERNATIONAL.finditer(text, start, end):
        if _is_international(match[0]):
            yield "phone number", *match.span()


def personal_data(text: str) -> list[Found]:
    """E-mail addresses, phone numbers, card numbers, Chinese identity numbers and secrets in a text, in their order.

    Phone numbers: with + and a country's code, in North-American form, or Chinese mobiles. Secrets: the keys of known
    services, JSON Web Tokens, headers of private keys, and random-looking values assigned to a password, token or key.
    Kinds are "e-mail address", "phone number", "card number", "identity number" and "secret". No finding overlaps
    another.
    """
    candidates = [("secret", *span) for span in _secrets(text)]
    if "@" in text:
        # A remote of git names an account that is nobody's.
        candidates += [("e-mail address", *m.span()) for m in _EMAIL.finditer(text) if not m[0].startswith("git@")]
    for digits in _DIGITS.finditer(text):
        candidates += _numbers(text, max(digits.start() - 2, 0), digits.end() + 2)
    if not candidates:
        return []
    taken = bytearray(len(text))
    found = []
    for kind, start, end in candidates:
        if taken.find(1, start, end) < 0:
            taken[start:end] = b"\1" * (end - start)
            found.append(Found(kind, start, end))
    return sorted(found, key=lambda piece: piece.start)


_EMOJI = "\u00a9\u00ae\u203c\u2049\u20e3\u2100-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
# Scripts whose letters join or stack: Arabic to Myanmar, Khmer and Mongolian, Balinese to Vedic, the rest of Indic.
_JOINING = "\u0600-\u109f\u1780-\u18af\u1b00-\u1cff\ua800-\uabff\ufb50-\ufdff\ufe70-\ufefc\U00010a00-\U00011fff"
_SELECTORS = "\ufe00-\ufe0f\U000e0100-\U000e01ef"
# Control characters, soft hyphen, zero-width and bidirectional ones, tags: an invisible character or a part of what
# is legitimate. One class, for a quick first look.
_SUSPECT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b-\u200d\u202a-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f"
    f"{_SELECTORS}]"
)
_INVISIBLE = re.compile(
    # Kept: the flags of England, Scotland and Wales.
    "(\U0001f3f4[\U000e0020-\U000e007e]{1,6}\U000e007f)"
    "|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u202a-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
    # A zero-width space parts the words of scripts without spaces.
    "|(?<![\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])\u200b"
    f"|(?<![{_JOINING}])\u200c"
    f"|(?<![{_JOINING}])(?!(?:(?<=[{_EMOJI}])|(?<=[{_EMOJI}]\ufe0f))\u200d[{_EMOJI}])\u200d"
    # A selector chooses a variant of the symbol, digit or ideograph before it.
    "|(?<![0-9#*\u00a1-\u00ac\u00ae-\u1fff\u2010-\u2027\u2030-\u205e\u2070-\ufdff\ufe30-\ufefe\uff00-\U000dffff])"
    f"[{_SELECTORS}]"
)
_UNFILLED = re.compile(
    # Not the nested braces of TeX and of code.
    r"(?<![\w{}^\\$=])\{\{\s{0,4}[^\W\d][\w.\- ]{0,60}\}\}(?!\})"
    r"|\[(?:(?i:insert)\s|Your [A-Z]|YOUR )[^\[\]\n]{1,80}\]"
)


# All that ftfy takes for mojibake has two such characters in a row, or one of a few; its own test is slow.
_PERHAPS_MOJIBAKE = re.compile("[\x80-\u2dff\uf8ff-\uffff]{2}|[\x80-\x9fÂÃŒœ]")


# Quotation marks that open in Swedish, Finnish and German books. Before a capital with an accent ftfy takes them for
# mojibake in Mac Roman, and would read ”Äpplet as Ӏpplet.
_OPENING = re.compile(r"(?<!\S)[”»](?=\w)")


def _decoded(text: str) -> str:
    """The text with mojibake decoded rightly; what only looks unlikely, like »Ärger«, stays.

    By line, since a line in another encoding or script would keep the whole from being decoded.
    """
    if text.isascii() or not _PERHAPS_MOJIBAKE.search(text):
        return text
    from ftfy import fix_encoding
    from ftfy.badness import is_bad

    return "\n".join(
        fix_encoding(line) if _PERHAPS_MOJIBAKE.search(line) and is_bad(_OPENING.sub("", line)) else line
        for line in text.split("\n")
    )


def damage(text: str) -> list[str]:
    """Which kinds of damage a text has, of those below.

    "mojibake": bytes decoded in a wrong encoding, where the right one can be told; "replacement character": U+FFFD;
    "invisible characters": control characters, zero-width and bidirectional ones, soft hyphens, tags, but not where
    scripts and emoji are written with them; "unfilled placeholder": `{{name}}`, `[Insert date here]`, `[Your Name]`.
    """
    found = []
    if _decoded(text) != text:
        found.append("mojibake")
    if "\ufffd" in text:
        found.append("replacement character")
    if _SUSPECT.search(text) and any(match[1] is None for match in _INVISIBLE.finditer(text)):
        found.append("invisible characters")
    if ("{{" in text or "[" in text) and _UNFILLED.search(text):
        found.append("unfilled placeholder")
    return found


def repaired(text: str) -> str:
    """The text without mojibake and invisible characters; nothing else changes, and a healthy text is left alone."""
    text = _decoded(text)
    return _INVISIBLE.sub(r"\1", text) if _SUSPECT.search(text) else text


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    # `zxx` is what is no language; other three-letter codes are varieties for which ISO 639-1 has none.
    identifier.set_languages([code for code in identifier.labels if len(code) == 2 or code == "zxx"])
    return identifier


def language(text: str) -> str | None:
    """The ISO 639-1 code of the language of a text's first 2,000 characters; None where that cannot be told.

    That is with fewer than 20 letters (5 of Chinese, Japanese and Korean), and for numbers, markup and code.
    """
    head = text[:2000]
    if sum(map(str.isalpha, head)) < 20 and len(_CJK.findall(head)) < 5:
        return None
    code, _ = _identifier().classify(head)
    return None if code == "zxx" else code
