"""The interface in both languages."""

from __future__ import annotations

import re

from finespun.evaluation.judging.words import NAMES, WORDS, preferred


def test_both_languages_say_the_same_things_with_the_same_blanks():
    assert set(WORDS) == set(NAMES)
    assert WORDS["en"].keys() == WORDS["zh"].keys()
    for key, english in WORDS["en"].items():
        assert english.count("{}") == WORDS["zh"][key].count("{}"), key


def test_words_can_be_named_in_templates():
    assert not set(WORDS["en"]) & set(dir(dict))  # jinja would give the dict's own method


def test_chinese_words_are_chinese():
    assert all(re.search("[\u4e00-\u9fff]", words) for words in WORDS["zh"].values())


def test_the_browsers_first_language_that_there_is():
    assert preferred("zh-CN,zh;q=0.9,en;q=0.8") == "zh"
    assert preferred("zh-TW") == "zh"
    assert preferred("en-US,en;q=0.9,zh;q=0.8") == "en"
    assert preferred("en;q=0.3, zh-Hans;q=0.7") == "zh"
    assert preferred("de,fr;q=0.5") == "en"
    assert preferred("fr, zh;q=0") == "en"
    assert preferred("") == "en"
    assert preferred("zh;q=nonsense, en") == "en"
