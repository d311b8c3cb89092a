"""The server with llama.cpp behind it."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
from servers import Running, running
from tokenizers import pre_tokenizers

import finespun
from finespun.data.templates import Encoder
from finespun.errors import GenerationError
from finespun.generation.settings import Sampling
from finespun.models.load import LoadedModel
from finespun.serving.llama_cpp import gguf_of, request_body

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finespun.serving.llama_cpp.data_cache", lambda: folder)
        sources = {"m": str(tiny_folder)}
        with running(sources=sources, engine="llama.cpp", quantization="f32", slots=4) as found:
            yield found


def test_greedy_texts_are_those_of_the_library(server: Running, tiny_folder: Path) -> None:
    prompts = ["the old ferryman", "a", "over the slow river"]
    expected = finespun.load(tiny_folder)
    for prompt in prompts:
        answer = server.client().chat.completions.create(
            model="m", messages=[{"role": "user", "content": prompt}], max_tokens=20
        )
        (wanted,) = expected.complete([prompt], max_new_tokens=20)[0]
        assert answer.choices[0].message.content == wanted.text
        assert answer.choices[0].finish_reason == wanted.finish_reason
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
            wanted.prompt_tokens,
            wanted.completion_tokens,
        )


def test_streams_seeds_and_log_probabilities(server: Running) -> None:
    ask = {"model": "m", "prompt": "the old", "max_tokens": 12, "temperature": 1.0, "seed": 3}
    client = server.client()
    whole = client.completions.create(**ask, logprobs=2)
    assert 0 < len(whole.choices[0].logprobs.tokens) <= 12, "llama.cpp gives none for parts of characters"
    stream = client.completions.create(**ask, stream=True)
    assert "".join(event.choices[0].text for event in stream) == whole.choices[0].text
    other = client.completions.create(**ask | {"seed": 4})
    assert other.choices[0].text != whole.choices[0].text


def test_what_it_does_not_know_is_said(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match=r"llama\.cpp engine does not know no_repeat_ngram_size"):
        server.client().completions.create(model="m", prompt="a", max_tokens=3, extra_body={"no_repeat_ngram_size": 2})
    with pytest.raises(GenerationError, match="does not know beams, regex"):
        request_body([1], Sampling(beams=2, regex="a"), 0)


def test_a_client_that_leaves_stops_the_text(server: Running) -> None:
    stream = server.client().completions.create(model="m", prompt="the old", max_tokens=100, stream=True)
    next(iter(stream))
    stream.close()
    again = server.client().completions.create(model="m", prompt="the old", max_tokens=3)
    assert again.usage.completion_tokens <= 3


def test_the_file_is_made_once(tiny: LoadedModel, tiny_folder: Path, server: Running, monkeypatch) -> None:
    """And the model is not loaded for a file that is there. One for another tokenizer is another file."""

    def not_again(*_: object) -> None:
        raise AssertionError("made twice")

    monkeypatch.setattr("finespun.serving.llama_cpp.load_model", not_again)
    encoder = Encoder(tiny.tokenizer)
    assert gguf_of(str(tiny_folder), encoder, "f32").is_file()
    with pytest.raises(AssertionError, match="made twice"):
        gguf_of(str(tiny_folder), encoder, "q8_0")
    tiny.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(AssertionError, match="made twice"):
        gguf_of(str(tiny_folder), encoder, "f32")


def test_in_f32_log_probabilities_are_those_of_the_library(
    server: Running, tiny: LoadedModel, tiny_folder: Path
) -> None:
    """To 1e-4, which keys and values in float16 would not keep to. What is written is forced to be whole characters,
    for which llama.cpp tells them."""
    prompt, (forced,) = "the old ferryman rowed over a slow river", tiny.tokenizer("a")["input_ids"]
    ask = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 20, "logprobs": True}
    answer = server.client().chat.completions.create(model="m", logit_bias={str(forced): 100}, **ask)
    sampling = {"max_new_tokens": 20, "logprobs": 0, "logit_bias": {forced: 100.0}}
    (wanted,) = finespun.load(tiny_folder).complete([prompt], **sampling)[0]
    found = answer.choices[0].logprobs.content
    assert [token.token for token in found] == ["a"] * 20
    assert [token.logprob for token in found] == pytest.approx([one.logprob for one in wanted.logprobs], abs=1e-4)
