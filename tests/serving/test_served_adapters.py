"""Several models of one base: one set of weights and one engine, chosen by name."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from servers import Running, running, wait_until

from finespun.generation.engine import Engine
from finespun.serving import service
from finespun.serving.service import Loader, ServedModel
from finespun.serving.settings import ServerSettings
from finespun.serving.worker import AdapterOfEngine
from finespun.text_model import TextModel
from lora_folders import write_adapter

PROMPTS = ["the old ferryman", "a", "over the slow river and said nothing", "江雪", "heron mill boat " * 5]

OTHER_TEMPLATE = "{% for message in messages %}{{ message['content'] + '|' }}{% endfor %}"


@pytest.fixture(scope="module")
def sources(tiny_folder: Path, small_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model and four adapters of it: one with another template and another token that ends its turns, one that needs
    a model of its own."""
    place = tmp_path_factory.mktemp("adapters")
    other = deepcopy(small_tokenizer)
    other.eos_token = "<|im_start|>"
    other.chat_template = OTHER_TEMPLATE
    targets = {"target_modules": ["q_proj", "v_proj", "up_proj"]}
    return {
        "stories": str(write_adapter(tiny_folder, place / "stories", small_tokenizer, 1, r=4, **targets)),
        "tiny": str(tiny_folder),
        "poems": str(write_adapter(tiny_folder, place / "poems", other, 2, r=3, use_rslora=True, **targets)),
        "own": str(write_adapter(tiny_folder, place / "own", small_tokenizer, 3, use_dora=True, **targets)),
        "letters": str(write_adapter(tiny_folder, place / "letters", small_tokenizer, 4, r=2, **targets)),
    }


def load_all(sources: dict[str, str], **settings: Any) -> dict[str, ServedModel]:
    load = Loader(sources)
    return {name: load(name, source, ServerSettings(**settings)) for name, source in sources.items()}


def serving(sources: dict[str, str], **settings: Any) -> Any:
    return running(Loader(sources), sources, **settings)


def engine_of(model: ServedModel) -> Engine:
    assert isinstance(model.backend, AdapterOfEngine)
    return model.backend.thread._engine


def test_each_name_writes_what_its_model_writes_alone(sources: dict[str, str]) -> None:
    """All at once, as chats and as plain texts."""
    alone = {name: TextModel.load(source) for name, source in sources.items()}
    chats: list[Any] = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    expected = {name: model.generate(chats, max_new_tokens=12) for name, model in alone.items()}
    with serving(sources) as server, server.client() as client, ThreadPoolExecutor(25) as pool:

        def ask(name: str, number: int) -> str:
            chat = client.chat.completions.create(
                model=name, messages=chats[number], max_completion_tokens=12, temperature=0
            )
            assert chat.model == name
            return chat.choices[0].message.content or ""

        asked = [(name, number) for number in range(len(PROMPTS)) for name in sources]
        for (name, number), text in zip(asked, pool.map(lambda each: ask(*each), asked), strict=True):
            assert text == expected[name][number]
        assert len({tuple(texts) for texts in expected.values()}) == len(sources)
        assert [model.id for model in client.models.list()] == list(sources)
        metrics = httpx.get(f"{server.url}/metrics").text
        for name in sources:
            assert re.search(rf'finespun_completion_tokens_total{{model="{name}"}} [1-9]', metrics)


def test_adapters_cost_their_own_matrices_only(sources: dict[str, str]) -> None:
    served = load_all(sources)
    try:
        shared = [served[name] for name in ("stories", "tiny", "poems", "letters")]
        engines = {id(engine_of(model)): engine_of(model) for model in shared}
        assert len(engines) == 1
        assert not isinstance(served["own"].backend, AdapterOfEngine)
        (engine,) = engines.values()
        base = {p.untyped_storage().data_ptr(): p.nbytes for p in engine._loaded.model.parameters()}
        adapters = [model.backend.adapter for model in shared if isinstance(model.backend, AdapterOfEngine)]
        of_adapters = {
            matrix.weight.untyped_storage().data_ptr(): matrix.weight.nbytes
            for adapter in adapters
            for a, b, _ in adapter.layers.values()
            for matrix in (a, b)
        }
        plain = TextModel.load(sources["tiny"])._loaded.model
        assert sum(base.values()) == sum(parameter.nbytes for parameter in plain.parameters())
        assert base.keys().isdisjoint(of_adapters)
        # q: 32 → 32, v: 32 → 16, up: 32 → 64, in two layers, float32
        assert sum(of_adapters.values()) == 4 * 2 * (4 + 3 + 2) * (32 + 32 + 32 + 16 + 32 + 64)
    finally:
        for model in served.values():
            model.backend.close()
    assert not any(model.backend.alive for model in served.values())


def test_limits_are_those_of_each_name(sources: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One name's slots and queue are full; another's are not."""
    gate = threading.Event()
    original = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: gate.wait(20) and original(self))
    with serving(sources, slots=2, max_queue=1) as server, server.client() as client, ThreadPoolExecutor(9) as pool:

        def ask(name: str) -> str:
            return client.completions.create(model=name, prompt="a", max_tokens=5, temperature=0).choices[0].text

        full = [pool.submit(ask, "stories") for _ in range(3)]
        wait_until(lambda: server.service.models["stories"].in_flight == 3)
        with pytest.raises(openai.RateLimitError):
            ask("stories")
        others = [pool.submit(ask, name) for name in ("poems", "tiny", "poems", "poems")]
        wait_until(lambda: server.service.models["poems"].in_flight == 3)
        said = texts_in_flight(server)
        assert said["stories"] == said["poems"] == {"written": 2, "waiting": 1}
        assert said["tiny"] == {"written": 1, "waiting": 0}
        assert said["letters"] == {"written": 0, "waiting": 0}
        gate.set()
        assert len({future.result() for future in full}) == 1
        assert all(future.result() is not None for future in others)
        assert {model.in_flight for model in server.service.models.values()} == {0}


def texts_in_flight(server: Running) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for metric in server.service.metrics.collect():
        for sample in metric.samples:
            found.setdefault(sample.labels["model"], {})[sample.labels["state"]] = sample.value
    return found


def test_what_fails_in_one_engine_leaves_the_others(sources: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails ends the texts of the models that share it, with 503; then all go on."""
    with serving(sources) as server, server.client() as client:

        def ask(name: str) -> str:
            return client.completions.create(model=name, prompt="a boat", max_tokens=5, temperature=0).choices[0].text

        before = {name: ask(name) for name in sources}
        shared = engine_of(server.service.models["tiny"])
        monkeypatch.setattr(shared, "step", lambda: 1 / 0)
        with pytest.raises(openai.APIStatusError, match="Ask again"):
            ask("poems")
        assert {name: ask(name) for name in sources} == before
        assert server.service.healthy


def test_llama_cpp_has_a_model_for_each(sources: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(service, "load_served", lambda name, source, settings: asked.append((name, source)))
    load_all(sources, engine="llama.cpp")
    assert asked == list(sources.items())
