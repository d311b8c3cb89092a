"""Texts that have to look like something, written by models that would not."""

from __future__ import annotations

import json
import re

import pytest

from finespun.data.templates import Encoder
from finespun.errors import GenerationError
from finespun.generation.constraints import Constraint
from finespun.generation.engine import Engine, generate
from finespun.generation.settings import Sampling
from finespun.models.load import LoadedModel

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "languages": {"type": "array", "items": {"enum": ["English", "中文", "Deutsch"]}, "maxItems": 3},
    },
    "required": ["name", "age", "languages"],
    "additionalProperties": False,
}


def is_person(text: str) -> bool:
    found = json.loads(text)
    return (
        set(found) == {"name", "age", "languages"}
        and isinstance(found["name"], str)
        and len(found["name"]) <= 20
        and isinstance(found["age"], int)
        and 0 <= found["age"] <= 120
        and len(found["languages"]) <= 3
        and set(found["languages"]) <= {"English", "中文", "Deutsch"}
    )


@pytest.fixture
def encoder(tiny: LoadedModel) -> Encoder:
    return Encoder(tiny.tokenizer, "raw")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_follows_its_schema(tiny: LoadedModel, encoder: Encoder, temperature: float) -> None:
    prompts = [encoder.encode_prompt(f"{number}") for number in range(4)]
    sampling = Sampling(max_new_tokens=110, json_schema=PERSON, temperature=temperature)
    found = [each for row in generate(tiny, encoder, prompts, sampling, samples=3) for each in row]
    ended = [completion for completion in found if completion.finish_reason == "stop"]
    assert ended or not temperature, "a random model's likeliest texts go in circles"
    assert all(is_person(completion.text) for completion in ended)


def test_json_that_does_not_fit_is_not_called_complete(tiny: LoadedModel, encoder: Encoder) -> None:
    sampling = Sampling(max_new_tokens=5, json_schema=PERSON)
    (completion,) = generate(tiny, encoder, [[7]], sampling)[0]
    assert (completion.finish_reason, completion.completion_tokens) == ("length", 5)


@pytest.mark.parametrize(
    "settings",
    [
        {"regex": r"[A-Z]{2}-[0-9]{3,5}"},
        {"choices": ["yes", "no (see 4.2)", "可能|不"]},
        {"grammar": 'start: word ("," word)~2\nword: /[a-c]{1,4}/'},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_expressions_choices_and_grammars(tiny: LoadedModel, encoder: Encoder, settings: dict) -> None:
    pattern = {
        "regex": settings.get("regex", ""),
        "choices": "|".join(map(re.escape, settings.get("choices", []))),
        "grammar": "[a-c]{1,4}(,[a-c]{1,4}){2}",
    }[next(iter(settings))]
    sampling = Sampling(max_new_tokens=60, temperature=1.0, **settings)
    found = generate(tiny, encoder, [[7], [8, 9]], sampling, samples=10)
    texts = [completion.text for row in found for completion in row]
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    assert len(set(texts)) > 2
    assert {completion.finish_reason for row in found for completion in row} == {"stop"}


def test_constraints_of_one_batch_do_not_mix(tiny: LoadedModel, encoder: Encoder) -> None:
    """Beside ones without any."""
    alone = [generate(tiny, encoder, [[7]], Sampling(max_new_tokens=9, **each))[0][0] for each in MIXED]
    together = Engine(tiny, encoder)
    requests = [together.add([7], Sampling(max_new_tokens=9, **each)) for each in MIXED]
    while together.step():
        pass
    assert [request.completion for request in requests] == alone


MIXED = ({}, {"regex": "[0-9]+x"}, {"choices": ["a", "b"]}, {"json_schema": {"type": "boolean"}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regex": "(a"}, "regex: .*unclosed"),
        ({"json_schema": {"type": "fish"}}, "json_schema: .*fish"),
        ({"grammar": "start: nothing"}, "grammar: .*nothing"),
        ({"logit_bias": {400: 1.0}}, "logit_bias: there is no token 400; ids go to 399"),
    ],
)
def test_what_cannot_be_followed_is_refused(tiny: LoadedModel, encoder: Encoder, settings: dict, message: str) -> None:
    with pytest.raises(GenerationError, match=f"(?s){message}"):
        generate(tiny, encoder, [[7]], Sampling(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"grammar": "start: start start"},
        {"json_schema": {"$ref": "#"}},
        {"json_schema": {"enum": []}},
    ],
    ids=["a grammar", "a schema of itself", "a schema of nothing"],
)
def test_what_no_text_can_follow_is_refused_at_once(tiny: LoadedModel, encoder: Encoder, settings: dict) -> None:
    """llguidance lets such a text end at once, as if the empty one kept to it."""
    with pytest.raises(GenerationError, match=next(iter(settings))):
        Engine(tiny, encoder).add([7], Sampling(**settings))


def test_one_that_cannot_be_followed_further_does_not_end_the_others(
    tiny: LoadedModel, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(self: Constraint, token: int) -> None:
        raise GenerationError("too large")

    both = Engine(tiny, encoder)
    bad, good = both.add([7], Sampling(regex="[ab]{5}")), both.add([8], Sampling(max_new_tokens=4))
    monkeypatch.setattr(Constraint, "take", breaks)
    while both.step():
        pass
    assert bad.completion is None
    with pytest.raises(GenerationError, match="too large"):
        bad.result()
    assert good.completion == generate(tiny, encoder, [[8]], Sampling(max_new_tokens=4))[0][0]


def test_two_constraints_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="json_schema and regex exclude each other"):
        Sampling(json_schema={}, regex="a")


@pytest.mark.slow
def test_two_hundred_of_two_hundred_are_valid(smollm2_shared: LoadedModel) -> None:
    encoder = Encoder(smollm2_shared.tokenizer)
    prompts = [encoder.encode_prompt(f"Describe person number {number} as JSON.") for number in range(100)]
    found = [
        completion.text
        for temperature in (0.0, 1.0)
        for row in generate(
            smollm2_shared,
            encoder,
            prompts,
            Sampling(max_new_tokens=200, json_schema=PERSON, temperature=temperature),
        )
        for completion in row
    ]
    assert len(found) == 200
    assert all(is_person(text) for text in found)
