"""Several LoRA adapters beside one model: each writes what it writes alone."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from random import Random

import pytest
import torch
from peft import PromptTuningConfig
from transformers import AutoConfig, AutoModelForCausalLM

from architectures import architectures
from finespun.data.templates import Encoder
from finespun.generation import engine
from finespun.generation.engine import Completion, Engine, Request, generate
from finespun.generation.runner import SingleRunner, SlotRunner, runner_for
from finespun.generation.settings import Sampling
from finespun.models.adapters import LoraAdapter, load_lora, shared_base
from finespun.models.load import LoadedModel, load_model
from finespun.models.prepacked import can_prepack
from lora_folders import write_adapter
from reference import text_of

ARCHITECTURES = architectures(vocab_size=400, positions=128)
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "opt": ["v_proj", "fc1"],
    "gemma3": ["k_proj", "o_proj"],
    "bloom": ["query_key_value", "dense_h_to_4h"],
}


@pytest.fixture
def base_folder(small_tokenizer, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A random model of the architecture that the test names."""
    torch.manual_seed(0)
    config = deepcopy(ARCHITECTURES[getattr(request, "param", "llama")])
    config.eos_token_id = small_tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "base")
    small_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def folders(base_folder: Path, small_tokenizer, tmp_path: Path) -> list[Path]:
    """The model, and adapters of it: of two ranks, for some layers or all, with both kinds of scales."""
    kind = kind_of(base_folder)
    some = TARGETS[kind]
    settings = (
        {"target_modules": some, "r": 4, "lora_alpha": 8},
        {"target_modules": some[:1], "r": 3, "lora_alpha": 5, "use_rslora": True},
        {"target_modules": "all-linear", "r": 2, "rank_pattern": {some[0]: 5}, "alpha_pattern": {some[0]: 20}},
    )
    return [base_folder] + [
        write_adapter(base_folder, tmp_path / f"{seed}", small_tokenizer, seed, fan_in_fan_out=kind == "gpt2", **each)
        for seed, each in enumerate(settings, 1)
    ]


def kind_of(folder: Path) -> str:
    return AutoConfig.from_pretrained(folder).model_type.removesuffix("_text")


def random_prompts(count: int, longest: int) -> list[list[int]]:
    random = Random(0)
    return [[random.randrange(3, 400) for _ in range(random.randint(1, longest))] for _ in range(count)]


def write_together(
    base: LoadedModel, adapters: Sequence[LoraAdapter], prompts: Sequence[Sequence[int]], sampling: Sampling, slots=64
) -> list[list[Completion]]:
    """What each adapter writes after each prompt, all in one engine, one adapter next to another."""
    one = Engine(base, Encoder(base.tokenizer, "raw"), slots, adapters)
    requests = [[one.add(prompt, sampling, adapter=adapter) for adapter in adapters] for prompt in prompts]
    with one.running():
        while one.step():
            pass
    return [[row[number].result() for row in requests] for number in range(len(adapters))]


def load_adapters(base: LoadedModel, folders: Sequence[Path]) -> list[LoraAdapter]:
    found = [load_lora(base, str(folder)) for folder in folders]
    assert None not in found
    return [adapter for adapter in found if adapter is not None]


@pytest.mark.parametrize("base_folder", TARGETS, indirect=True)
def test_each_writes_what_it_writes_alone(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Token for token as transformers and peft have it, one prompt at a time; here read in pieces, in mixed company."""
    base = load_model(str(folders[0]), "float32")
    adapters = load_adapters(base, folders)
    prompts = random_prompts(10, longest=40)
    prompts.append([*prompts[0], *prompts[1]])
    monkeypatch.setattr(engine, "AT_ONCE", 50)
    found = write_together(base, adapters, prompts, Sampling(max_new_tokens=12), slots=3)
    for folder, completions in zip(folders, found, strict=True):
        alone = load_model(str(folder), "float32")
        for prompt, completion in zip(prompts, completions, strict=True):
            output = alone.model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=0,
            )
            assert completion.text == text_of(Encoder(base.tokenizer, "raw"), output[0, len(prompt) :].tolist())
    assert len({tuple(completion.text for completion in completions) for completions in found}) == len(folders)
    assert isinstance(runner_for(base), SingleRunner if kind_of(folders[0]) == "bloom" else SlotRunner)


@pytest.mark.skipif(not can_prepack(), reason="this CPU has no bfloat16 products")
@pytest.mark.parametrize("base_folder", ["llama", "gpt2"], indirect=True)
def test_and_to_the_bit_in_bfloat16(folders: list[Path]) -> None:
    base = load_model(str(folders[0]), "bfloat16")
    adapters = load_adapters(base, folders)
    sampling = Sampling(max_new_tokens=15, temperature=1.0, logprobs=1)
    prompts = random_prompts(12, longest=40)
    found = write_together(base, adapters, prompts, sampling)
    for folder, completions in zip(folders, found, strict=True):
        alone = load_model(str(folder), "bfloat16")
        assert completions == [one for (one,) in generate(alone, Encoder(alone.tokenizer, "raw"), prompts, sampling)]


def test_what_an_adapter_has_read_is_no_other_adapters(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same long prompt: each adapter reads it once, whether the others read it before or at the same time."""
    base = load_model(str(folders[0]), "float32")
    adapters = load_adapters(base, folders)
    prompt = random_prompts(1, 1)[0] * 50
    sampling = Sampling(max_new_tokens=4)
    alone = [
        generate(model, Encoder(model.tokenizer, "raw"), [prompt], sampling)[0][0]
        for model in (load_model(str(folder), "float32") for folder in folders)
    ]
    runner_for(base)  # which tries something out the first time
    read: list[int] = []
    original = SlotRunner.logits
    monkeypatch.setattr(
        SlotRunner, "logits", lambda self, rs: read.extend(len(r.part.ids) for r in rs) or original(self, rs)
    )
    assert write_together(base, adapters, [prompt], sampling) == [[one] for one in alone]
    assert read[:4] == [50] * 4, "none waits for another one's"
    one = Engine(base, Encoder(base.tokenizer, "raw"), 4, adapters)
    for _ in range(2):
        for adapter, expected in zip(adapters, alone, strict=True):
            read.clear()
            request = one.add(prompt, sampling, adapter=adapter)
            while one.step():
                pass
            assert request.result() == expected
    assert sum(read) <= 1 + 4, "the second time it was there already"


def test_each_adapter_has_slots_of_its_own(folders: list[Path]) -> None:
    """Many texts of one do not make those of another wait."""
    base = load_model(str(folders[0]), "float32")
    first, second, _ = load_adapters(base, folders[1:])
    one = Engine(base, Encoder(base.tokenizer, "raw"), 2, [first, second])
    long, short = (Sampling(max_new_tokens=tokens, logit_bias={0: -100}) for tokens in (20, 3))
    many = [one.add([7 + number], long, adapter=first) for number in range(6)]
    few = [one.add([9, number], short, adapter=second) for number in (5, 6)]

    def begun(requests: list[Request]) -> int:
        return sum(bool(request.new) and not request.ended for request in requests)

    one.step()
    assert (begun(many), begun(few)) == (2, 2)
    while one.step():
        assert begun(many) <= 2
    assert all(request.completion for request in [*many, *few])
    one._cache_tokens = 128  # memory for two
    many = [one.add([7 + number], long, adapter=first) for number in range(6)]
    few = [one.add([9, number], short, adapter=second) for number in (5, 6)]
    one.step()
    assert (begun(many), begun(few)) == (1, 1)


def test_each_has_its_own_tokenizer_and_stop_tokens(folders: list[Path], small_tokenizer) -> None:
    base = load_model(str(folders[0]), "float32")
    adapters = load_adapters(base, folders)
    plain = Encoder(small_tokenizer, "raw")
    prompt, sampling = [9, 20, 30], Sampling(max_new_tokens=12, logprobs=0)
    ((first,),) = write_together(base, adapters[:1], [prompt], sampling)
    assert first.logprobs is not None
    ids = [token.id for token in first.logprobs]
    hidden, last = list(dict.fromkeys(ids))[:2]
    other = deepcopy(small_tokenizer)
    other.add_special_tokens({"additional_special_tokens": [other.convert_ids_to_tokens(hidden)]})
    other.eos_token = other.convert_ids_to_tokens(last)
    one = Engine(base, plain, 4, adapters)
    usual = one.add(prompt, sampling, adapter=adapters[0])
    unusual = one.add(prompt, sampling, adapter=adapters[0], encoder=Encoder(other, "raw"))
    while one.step():
        pass
    assert usual.result().text == first.text
    assert unusual.result().finish_reason == "stop"
    assert unusual.result().completion_tokens == ids.index(last)
    assert unusual.result().text == "", "its only token is not shown"


def test_an_engine_leaves_the_model_as_it_was(folders: list[Path]) -> None:
    base = load_model(str(folders[0]), "float32")
    ids = torch.tensor([[5, 6, 7, 8]])
    before, names = base.model(ids).logits, list(base.model.state_dict())
    adapters = load_adapters(base, folders)
    write_together(base, adapters, [[5, 6, 7]], Sampling(max_new_tokens=2))
    assert torch.equal(base.model(ids).logits, before)
    assert list(base.model.state_dict()) == names
    assert not base.has_adapter


def test_what_shares_its_base(base_folder: Path, small_tokenizer, tmp_path: Path) -> None:
    def written(name: str, **settings) -> str:
        return str(write_adapter(base_folder, tmp_path / name, small_tokenizer, **settings))

    base = shared_base(str(base_folder))
    assert base is not None
    for plain in (
        written("plain", target_modules=["q_proj"]),
        written("scaled", target_modules=["q_proj", "up_proj"], use_rslora=True, lora_dropout=0.1, r=3),
    ):
        assert shared_base(plain) == base
        assert shared_base(plain, "bfloat16") != base
    for own in (
        written("dora", target_modules=["q_proj"], use_dora=True),
        written("head", target_modules=["q_proj"], modules_to_save=["lm_head"]),
        written("tokens", target_modules=["q_proj"], trainable_token_indices=[5, 6]),
        written("bias", target_modules=["q_proj"], bias="lora_only"),
        written("prompt", config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        written("embeddings", target_modules=["q_proj", "embed_tokens"]),
    ):
        assert shared_base(own) is None, own
    other = AutoModelForCausalLM.from_pretrained(base_folder)
    torch.nn.init.normal_(other.model.norm.weight)
    other.save_pretrained(tmp_path / "other")
    assert shared_base(str(tmp_path / "other")) not in (base, None)


def test_what_needs_a_model_of_its_own_is_found_when_it_is_loaded(
    base_folder: Path, small_tokenizer, tmp_path: Path
) -> None:
    larger = deepcopy(small_tokenizer)
    larger.add_tokens(["<a>", "<b>"])
    base = load_model(str(base_folder), "float32")
    resized = write_adapter(base_folder, tmp_path / "resized", larger, target_modules=["q_proj"])
    head = write_adapter(
        base_folder, tmp_path / "head", small_tokenizer, target_modules=["q_proj", "lm_head"], rows=False
    )
    assert shared_base(str(resized)) == shared_base(str(head)) == shared_base(str(base_folder))
    assert load_lora(base, str(resized)) is None
    assert load_lora(base, str(head)) is None
    assert not any("lora" in name for name, _ in base.model.named_modules())
