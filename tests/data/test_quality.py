from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finespun.data.quality import (
    Found,
    NearDuplicates,
    Overlap,
    damage,
    language,
    ngram_hashes,
    personal_data,
    repaired,
    units,
)
from finespun.errors import DataError

# Tables are made and models read when first needed: a first example takes longer than the others.
unhurried = settings(max_examples=150)
# Texts as people write them; nothing in them is damaged.
HEALTHY = {
    "en": "“It’s fine,” she said – ‘really’ – and paid £5 for 10½ apples… naïve café, 20 °C, x² × y³, AT&T™ © 2024.",
    "de": "»Ärger« gibt’s öfter: „Straße“ ‚Größe‘ – 5 µm ± 2 %, § 3 Abs. 1; Übermaß und Œuvre.",
    "sv": "”Äpplet faller”, sade Åsa om sitt ”Öl”.",
    "sv, quoted on": "”Äpplet faller.\n”Åh!\n»Öl.",
    "fr": "L’œuvre « Été » de Noël ; où ça ? À l’Élysée, cœur n° 1.",
    "es": "¿Él? ¡Órale! El niño comió 1.º y 2.ª.",
    "pl": "Zażółć gęślą jaźń, łódź i żółw.",
    "ru": "Привет, мир — «да», сказал он № 5.",
    "el": "Καλημέρα κόσμε· τι κάνεις;",
    "fa": "سلام، می‌خواهم کتاب‌ها را ببینم.",
    "ar": "مرحبا بالعالم، كيف حالك؟",
    "he": "שלום עולם, מה שלומך?",
    "hi": "नमस्ते दुनिया, क्षत्रिय और क्‍ष लिखिए।",
    "si": "ශ්‍රී ලංකාව",
    "th": "สวัสดีชาวโลก ยินดีต้อนรับ",
    "km": "សួស្តី\u200bពិភពលោក",
    "zh": "你好，世界！“引号”《书名》……ＡＢＣ。",
    "ja": "こんにちは、世界！コンピューターで「葛󠄀城」と書く。",
    "ko": "안녕하세요, 세계!",
    "emoji": "👩‍💻 ❤️‍🔥 🏴‍☠️ 🏳️‍🌈 👍🏽 1️⃣ #️⃣ ☺️ 👨🏽‍🤝‍👨🏻 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ©️ ↔️",
    "code": "def f(x):\n\treturn {'a': {1: 2}}\r\n",
}


def found(text: str) -> list[tuple[str, str]]:
    return [(piece.kind, text[piece.start : piece.end]) for piece in personal_data(text)]


# Units


def slow_units(text: str) -> list[str]:
    """Character by character, from Unicode's names and categories instead of ranges."""
    result: list[str] = []
    joins = attaches = False  # whether a letter may go on with the last unit, and whether a mark may
    for character in unicodedata.normalize("NFKC", text).casefold():
        name = unicodedata.name(character, "")
        single = name.startswith(("CJK UNIFIED", "HIRAGANA LETTER", "KATAKANA LETTER", "HANGUL SYLLABLE", "THAI CHAR"))
        if unicodedata.category(character)[0] == "M":
            if attaches:
                result[-1] += character
        elif not character.isalnum():
            joins = attaches = False
        else:
            if joins and not single:
                result[-1] += character
            else:
                result.append(character)
            joins, attaches = not single, True
    return result


SCRIPTS = st.sampled_from("aZ1_ß.ﬁÉ '\u0301яДاب\u064bकखि\u094dกไดี้你好世。あガ한국½²😀\ufe0f-\u2019\n\U0001d400")


@unhurried
@given(st.text(SCRIPTS, max_size=40))
def test_units_are_those_of_a_walk_over_characters(text: str) -> None:
    assert units(text) == slow_units(text)


@pytest.mark.parametrize("name", HEALTHY)
def test_units_of_real_sentences_are_those_of_a_walk_over_characters(name: str) -> None:
    if name not in ("km", "ja"):  # the walk knows neither Khmer nor the prolonged sound mark
        assert units(HEALTHY[name]) == slow_units(HEALTHY[name])


def test_case_width_and_composition_make_no_difference() -> None:
    assert units("ＣＡＦÉ Straße") == units("cafe\u0301 STRASSE") == ["café", "strasse"]


def test_equal_windows_of_units_have_equal_hashes_and_others_do_not() -> None:
    parts = [random.Random(0).choice("abcde") for _ in range(500)]
    grams = ngram_hashes(parts, 4)
    for n, hashes in enumerate(grams, start=1):
        windows = [tuple(parts[place : place + n]) for place in range(len(parts) - n + 1)]
        assert len(windows) == len(hashes)
        assert len(set(zip(windows, hashes.tolist(), strict=True))) == len(set(windows)) == len(set(hashes.tolist()))
    assert len({int(value) for hashes in grams for value in hashes}) == sum(len(set(h.tolist())) for h in grams)


# Near-duplicates


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of the sets of three successive words."""
    sets = [set(zip(words, words[1:], words[2:], strict=False)) for words in (one.split(), other.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_texts_are_alike_exactly_when_their_jaccard_similarity_is_clearly_above_the_threshold() -> None:
    chance = random.Random(1)
    clear = {True: 0, False: 0}
    for trial in range(400):
        words = [f"w{chance.randrange(5000)}" for _ in range(chance.randrange(30, 200))]
        edited = words.copy()
        for _ in range(chance.randrange(0, 1 + len(words) // 6)):
            edited[chance.randrange(len(edited))] = "edited"
        one, other = " ".join(words), " ".join(edited)
        truth = similarity(one, other)
        if 0.68 < truth < 0.92:
            continue
        seen = NearDuplicates(threshold=0.8)
        assert seen.first_like(one, trial) is None
        assert seen.first_like(other, -1) == (trial if truth > 0.8 else None), truth
        clear[truth > 0.8] += 1
    assert min(clear.values()) > 30


def test_a_pair_at_the_threshold_is_looked_at_and_not_lost_between_bands() -> None:
    chance, hits = random.Random(2), 0
    for _ in range(100):
        words = [f"w{chance.randrange(10**6)}" for _ in range(300)]
        seen = NearDuplicates(threshold=0.5)
        seen.first_like(" ".join(words), 0)
        # 4/5 of the words: a similarity of 0.8 where 0.5 is asked for.
        hits += seen.first_like(" ".join(words[:240]), 1) == 0
    assert hits == 100


def test_the_earliest_of_several_alike_is_named_and_duplicates_are_not_kept() -> None:
    words = [f"w{number}" for number in range(200)]
    first = " ".join(words)
    # Each is like the one before, the last is no longer like the first.
    second, third = " ".join(words[14:]), " ".join(words[40:])
    seen = NearDuplicates(threshold=0.8)
    assert seen.first_like(first, 70) is None
    assert seen.first_like(second, 80) == 70
    assert seen.first_like(third, 90) is None
    assert seen.first_like(second, 100) == 70
    assert seen.first_like(third, 110) == 90


def test_short_texts_are_alike_only_when_equal() -> None:
    seen = NearDuplicates(threshold=0.1)
    assert seen.first_like("yes of course", 1) is None
    assert seen.first_like("yes of", 2) is None
    assert seen.first_like("Yes, of course!", 3) == 1
    assert seen.first_like("yes of course it is", 4) is None
    assert seen.first_like("😀", 5) is None
    assert seen.first_like("😢", 6) is None
    assert seen.first_like(" 😀\n", 7) == 5
    assert seen.first_like("", 8) is None
    assert seen.first_like(" ", 9) == 8


@pytest.mark.parametrize(("threshold", "permutations"), [(0.0, 128), (1.1, 128), (0.8, 0)])
def test_impossible_settings_of_near_duplicates_are_refused(threshold: float, permutations: int) -> None:
    with pytest.raises(DataError):
        NearDuplicates(threshold, permutations)


# Overlap


def slow_shares(held_out: list[str], training: list[str], n: int) -> list[float]:
    def windows(parts: list[str], length: int) -> list[tuple[str, ...]]:
        return [tuple(parts[start : start + length]) for start in range(len(parts) - length + 1)]

    shares = []
    for text in held_out:
        parts = slow_units(text)
        length = min(n, len(parts))
        mine = windows(parts, length) if length >= min(5, n) else []
        theirs = {window for other in training for window in windows(slow_units(other), length)}
        shares.append(sum(window in theirs for window in mine) / len(mine) if mine else 0.0)
    return shares


SENTENCES = st.lists(st.lists(st.sampled_from("abc你"), max_size=14).map(" ".join), max_size=6)


@unhurried
@given(held_out=SENTENCES, training=SENTENCES, n=st.sampled_from([1, 2, 4, 6, 13]))
def test_overlap_is_the_share_of_n_grams_that_a_slow_count_finds(
    held_out: list[str], training: list[str], n: int
) -> None:
    overlap = Overlap(held_out, n)
    for text in training:
        overlap.add(text)
    assert overlap.shares() == pytest.approx(slow_shares(held_out, training, n))


def test_overlap_finds_a_leaked_passage_among_much_else() -> None:
    chance = random.Random(3)
    held_out = [" ".join(f"w{chance.randrange(3000)}" for _ in range(length)) for length in (100, 60, 8, 4)]
    overlap = Overlap(held_out)
    for _ in range(200):
        overlap.add(" ".join(f"w{chance.randrange(3000)}" for _ in range(300)))
    assert overlap.shares() == [0.0, 0.0, 0.0, 0.0]
    overlap.add("before " + " ".join(held_out[0].split()[:56]).upper() + " after")
    overlap.add("before " + held_out[2] + " after " + held_out[3])
    # 44 of 88 13-grams; the text of 8 words as a whole; 4 words are too few to tell.
    assert overlap.shares() == [0.5, 0.0, 1.0, 0.0]


def test_n_grams_without_units_are_refused() -> None:
    with pytest.raises(DataError, match="at least 1"):
        Overlap(["a text"], 0)


def test_results_are_the_same_in_every_process() -> None:
    program = """
import random
from finespun.data.quality import NearDuplicates, ngram_hashes, units
from finespun.data.selection import select
chance = random.Random(5)
texts = [" ".join(chance.choices("abc你", k=chance.randrange(5, 25))) for _ in range(300)]
seen = NearDuplicates(0.5, 32)
print([seen.first_like(text, place) for place, text in enumerate(texts)])
print([grams.sum() for grams in ngram_hashes(units(" ".join(texts)), 13)])
selection = select(texts, texts[:20], 50)
print(selection.indices, selection.gained, selection.lost, selection.divergence_after)
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(outputs) == 1
    near, *_ = outputs.pop().splitlines()
    assert any(character.isdigit() for character in near)


# Personal data

PERSONAL = [
    ("e-mail address", "Write to <jane.doe+news@mail.example.co.uk>, please.", "jane.doe+news@mail.example.co.uk"),
    ("e-mail address", "邮箱foo_bar@qq.com请联系", "foo_bar@qq.com"),
    ("e-mail address", "mailto:a@b.io.", "a@b.io"),
    ("phone number", "Tel. +49 (0)89 1234567.", "+49 (0)89 1234567"),
    ("phone number", "ring +44 20 7946 0958 now", "+44 20 7946 0958"),
    ("phone number", "+390612345678", "+390612345678"),
    ("phone number", "call (212) 555-0123!", "(212) 555-0123"),
    ("phone number", "212-555-0123", "212-555-0123"),
    ("phone number", "212.555.0123.", "212.555.0123"),
    ("phone number", "1-800-555-1234", "1-800-555-1234"),
    ("phone number", "+1 212 555 0123", "+1 212 555 0123"),
    ("phone number", "+12125550123x9", "+12125550123"),
    ("phone number", "电话13812345678。", "13812345678"),
    ("phone number", "+86 138 1234 5678", "+86 138 1234 5678"),
    ("phone number", "138-1234-5678", "138-1234-5678"),
    ("card number", "card 4111 1111 1111 1111 12/27", "4111 1111 1111 1111"),
    ("card number", "4111 1111 1111 1111 123", "4111 1111 1111 1111"),
    ("card number", "5 5555555555554444 5", "5555555555554444"),
    ("card number", "3782-822463-10005", "3782-822463-10005"),
    ("card number", "6222 0212 3456 7890 128", "6222 0212 3456 7890 128"),
    ("card number", "30569309025904", "30569309025904"),
    ("identity number", "身份证11010519491231002X号", "11010519491231002X"),
    ("secret", "id AKIAIOSFODNN7EXAMPLE ok", "AKIAIOSFODNN7EXAMPLE"),
    ("secret", "ghp_" + "aB3d" * 9, "ghp_" + "aB3d" * 9),
    ("secret", "glpat-" + "aB3d" * 5, "glpat-" + "aB3d" * 5),
    ("secret", "xoxb-123456789012-abcdef", "xoxb-123456789012-abcdef"),
    ("secret", "key=sk-ant-api03-aB_3d-5fG7hJ9kL1mN3pQ", "sk-ant-api03-aB_3d-5fG7hJ9kL1mN3pQ"),
    ("secret", "sk-proj-aB_3d-5fG7hJ9kL1mN3pQ", "sk-proj-aB_3d-5fG7hJ9kL1mN3pQ"),
    ("secret", "AIza" + "aB3d5" * 7, "AIza" + "aB3d5" * 7),
    ("secret", "hf_" + "aBcDeFgHiJ" * 3 + "kLmN", "hf_" + "aBcDeFgHiJ" * 3 + "kLmN"),
    ("secret", "sk_live_" + "aB3d" * 6, "sk_live_" + "aB3d" * 6),
    (
        "secret",
        "Bearer eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM.dozjgNryP4J3jVm",
        "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM.dozjgNryP4J3jVm",
    ),
    ("secret", "-----BEGIN RSA PRIVATE KEY-----\nMII", "-----BEGIN RSA PRIVATE KEY-----"),
    ("secret", "password=Tr0ub4dor&3", "Tr0ub4dor&3"),
    ("secret", 'API_KEY: "9f86d081884c7d659a2f"', "9f86d081884c7d659a2f"),
    ("secret", "{'client_secret' => 'x7Kq9!mZp2'}", "x7Kq9!mZp2"),
]


@pytest.mark.parametrize(("kind", "text", "piece"), PERSONAL)
def test_personal_data_is_found_where_it_stands(kind: str, text: str, piece: str) -> None:
    assert found(text) == [(kind, piece)]


@pytest.mark.parametrize(
    "text",
    [
        "a@b, @user@server.social, icon@2x.png, git@github.com:a/b.git, package@1.2.3, me@localhost",
        "in 1999-2005 and on 2024-01-15, 12/05/2023 10:30:00, 2024-01-15 2024-01-16",
        "ISBN 978-3-16-148410-0, 9783161484100, 0-306-40615-2",
        "3.14159265358979, 0.13812345678, 1,234,567,890, 13,812,345,678, $13812345678, 15000000000 stars",
        "123456789012, 1700000000000, 1700000000, 192.168.100.200, 550e8400-e29b-41d4-a716-446655440000",
        "+10 000 000 people, +20 000 000, +100 000 000, +12 345 678",
        "212 555 0123, 112-555-0123, 12125550123",
        "4111 1111 1111 1112, 4111111111111112, 9111111111111111, 411111111111111, 4111 11111111 1111",
        "110105194912310021, 11010519491331002X",
        "the task-based, sk-learn-some-documentation-page-2, sk-abcdefghijklmnopqrstuv, riskghp_" + "aB3d" * 9,
        "AKIAIOSFODNN7, hf_transformers, AIzaShort, eyJhbGciOiJIUzI1, xoxo-xoxo, -----BEGIN PUBLIC KEY-----",
        "password: required, token = config.get(name2), password: your_password1, secret=${SECRET_2_HERE}",
        "password=12345678, token: aaaaaaa1, Password: see page 12, the key: everything",
        *HEALTHY.values(),
    ],
)
def test_what_only_resembles_personal_data_is_left_alone(text: str) -> None:
    assert found(text) == []


def test_findings_are_in_order_and_do_not_overlap() -> None:
    text = "x7@mail.com password=x7Kq9@mail.com, +8613812345678; 11010519491231002X"
    pieces = personal_data(text)
    assert pieces[0] == Found("e-mail address", 0, 11)
    assert [piece.kind for piece in pieces] == ["e-mail address", "secret", "phone number", "identity number"]
    assert all(one.end <= other.start for one, other in pairwise(pieces))


HOSTILE = [
    "a@", "a@a.", "a.b@c.", "1", "1 ", "+1", "1-", "1/1.(1", "(212)", "+" + "1" * 29, "eyJ", "eyJaaaaaaaa.", "sk-",
    "xoxb-", "password=", "password   =   ", "-----BEGIN RSA A ", "PRIVATE KEY-----BEGIN ", "{{", "{{a ", "[insert a",
    "[Your A", "=", "token:", "\u200d", "\u200d❤", "\U0001f3f4\U000e0067", "a\u0301", "Ã", "4111 1111 1111 1112 ",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_a_text_made_to_be_slow_is_not(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    start = time.process_time()
    personal_data(text)
    damage(text)
    units(text)
    assert time.process_time() - start < 3  # what takes time in proportion takes about 0.2 s


# Damage and repair


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_text_has_no_damage_and_is_not_changed(name: str) -> None:
    assert damage(HEALTHY[name]) == []
    assert repaired(HEALTHY[name]) == HEALTHY[name]


@unhurried
@given(st.lists(st.sampled_from([word for text in HEALTHY.values() for word in text.split(" ")]), max_size=12))
def test_no_mixture_of_healthy_words_is_changed(words: list[str]) -> None:
    text = " ".join(words)
    assert repaired(text) == text
    assert damage(text) == []


@pytest.mark.parametrize("name", ["de", "pl", "ru", "zh", "fa"])
@pytest.mark.parametrize("encoding", ["latin-1", "sloppy-windows-1252"])
def test_bytes_read_in_a_wrong_encoding_are_found_and_read_rightly(name: str, encoding: str) -> None:
    import ftfy.bad_codecs  # noqa: F401  (knows the encoding)

    broken = HEALTHY[name].encode().decode(encoding)
    # A line next to it in another script does not hinder.
    text = f"{broken}\n你好，世界\n"
    assert "mojibake" in damage(text)
    assert repaired(text) == f"{HEALTHY[name]}\n你好，世界\n"


def test_quotes_that_became_control_characters_are_read_rightly() -> None:
    assert repaired("don\x92t") == "don’t"


@unhurried
@given(st.text(st.sampled_from("aZ «ÄÃÂâ€œ“é–\x80\x99\xa0®Œo.°²½ß×ØÙà√≈‚ﬁ"), max_size=6))
def test_the_first_look_for_mojibake_misses_nothing_that_ftfy_would_change(text: str) -> None:
    from ftfy import fix_encoding

    assert ("mojibake" in damage(text)) == (fix_encoding(text) != text)


INVISIBLE = {
    "zero-width space": "zero\u200bwidth",
    "word joiner": "a\u2060b",
    "byte-order mark": "\ufeffstart",
    "soft hyphen": "in\u00adfor\u00adma\u00adtion",
    "override": "abc\u202edef\u202c",
    "isolate": "abc\u2066def\u2069",
    "tags": "hello\U000e0041\U000e0042",
    "tag flag without an end": "\U0001f3f4\U000e0067\U000e0062",
    "control": "bell\x07",
    "escape": "\x1b[0m",
    "C1 control": "中\x85文",
    "joiner between letters": "a\u200db",
    "non-joiner between letters": "Auf\u200clage",
    "joiner before no emoji": "👩\u200d a",
    "selector after a letter": "a\ufe0fb",
    "data hidden in selectors": "😀\ufe0f\ufe01\U000e0110\U000e0111",
}


@pytest.mark.parametrize("name", INVISIBLE)
def test_invisible_characters_are_found_and_removed(name: str) -> None:
    text = INVISIBLE[name]
    assert "invisible characters" in damage(text)
    assert damage(repaired(text)) == []
    assert units(repaired(text)) == units("".join(c for c in text if unicodedata.category(c)[0] not in "CM"))


@unhurried
@given(
    st.text(
        st.sampled_from("a1 ❤👩😀🏴\ufe0f\ufe01\u200d\u200c\u200b\u00ad\U000e0067\U000e007f\U000e0101کक"), max_size=12
    )
)
def test_what_was_repaired_has_nothing_left_to_repair(text: str) -> None:
    assert "invisible characters" not in damage(repaired(text))
    assert repaired(repaired(text)) == repaired(text)
    assert ("invisible characters" in damage(text)) == (repaired(text) != text)


def test_a_replacement_character_is_damage_that_cannot_be_repaired() -> None:
    assert damage("caf\ufffd") == ["replacement character"]
    assert repaired("caf\ufffd") == "caf\ufffd"


@pytest.mark.parametrize(
    "text", ["Dear {{name}},", "{{ user.first_name }}", "by [Insert date here]", "[INSERT NAME]", "Yours, [Your Name]"]
)
def test_an_unfilled_placeholder_is_found(text: str) -> None:
    assert damage(text) == ["unfilled placeholder"]


@pytest.mark.parametrize(
    "text",
    [
        r"\frac{{x}}{{y}} and x^{{2}}",
        "{{{raw}}}",
        "title={{The Title}}",
        "f'{{}}' {'a': {'b': 1}}",
        "press [Insert] to paste",
        "he said [your own] house",
        "[Enter Hamlet]",
        "[1] {name} <NAME>",
    ],
)
def test_what_only_resembles_a_placeholder_is_left_alone(text: str) -> None:
    assert damage(text) == []


# Language


SENTENCES_IN = {
    "en": "The quick brown fox jumps over the lazy dog near the river.",
    "de": "Der schnelle braune Fuchs springt über den faulen Hund.",
    "fr": "Le renard brun saute par-dessus le chien paresseux près de la rivière.",
    "sv": "Den snabba bruna räven hoppar över den lata hunden vid ån.",
    "pl": "Szybki brązowy lis przeskakuje nad leniwym psem przy rzece.",
    "ru": "Быстрая коричневая лиса прыгает через ленивую собаку у реки.",
    "ar": "يقفز الثعلب البني السريع فوق الكلب الكسول بالقرب من النهر.",
    "hi": "तेज़ भूरी लोमड़ी नदी के पास आलसी कुत्ते के ऊपर से कूदती है।",
    "th": "สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจใกล้แม่น้ำ",
    "zh": "敏捷的棕色狐狸跳过了河边那只懒狗。",
    "ja": "すばやい茶色の狐が、川のそばの怠け者の犬を飛び越える。",
    "ko": "빠른 갈색 여우가 강가의 게으른 개를 뛰어넘는다.",
}


@pytest.mark.parametrize("code", SENTENCES_IN)
def test_the_language_of_a_sentence_is_told(code: str) -> None:
    assert language(SENTENCES_IN[code]) == code


def test_too_few_letters_name_no_language() -> None:
    assert language("The quick brown") is None
    assert language("12345 67890 --- 12345 67890 ... 12345") is None
    assert language("你好世界") is None
    assert language("今天天气很好") == "zh"


def test_what_is_no_language_or_has_no_two_letter_code_gives_no_other_code() -> None:
    code = language("0x7f3a91bc 0xdeadbeef 0x00ff12aa 0xcafebabe 0x12345678 a1b2c3d4e5f6 ffee00112233 aabbccddeeff")
    assert code is None
    cantonese = language("佢哋喺邊度呀？我哋而家去食飯啦，你嚟唔嚟呀？")
    assert cantonese == "zh"


def test_the_module_is_imported_without_its_heavy_helpers() -> None:
    program = (
        "import sys, finespun.data.quality, finespun.data.selection;"
        "print([n for n in ('torch', 'transformers', 'ftfy', 'rensa', 'py3langid') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
