"""What training takes, and how much is computed at once."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from architectures import architectures
from conftest import sentences
from finespun.data.formats import TextExample
from finespun.data.packing import micro_batches
from finespun.data.readers import Origin
from finespun.data.templates import Encoder, TokenizedExample
from finespun.models.gradient_checkpointing import decoder_layers
from finespun.models.load import LoadedModel
from finespun.models.prepacked import can_prepack
from finespun.recipe import TrainingRecipe
from finespun.training import memory
from finespun.training.memory import MemoryPlan, plan_memory, smaller_micro_batch
from finespun.training.objectives.causal_lm import CausalLM
from reference import tokenized

HERE = Origin("test", 1)


def examples(loaded: LoadedModel) -> list[TokenizedExample]:
    encoder = Encoder(loaded.tokenizer, "raw")
    return [encoder.encode_example(TextExample(text, HERE))[0] for text in sentences(40)]


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), size=st.integers(1, 400))
def test_halving_ends_where_one_example_is_alone_and_always_gets_smaller(lengths: list[int], size: int) -> None:
    batch = [tokenized([1] * length, [1.0] * length, HERE) for length in lengths]

    def largest(size: int) -> int:
        return max(sum(len(e.input_ids) for e in group) for group in micro_batches(batch, size))

    sizes = [size]
    while (smaller := smaller_micro_batch(batch, sizes[-1])) is not None:
        sizes.append(smaller)
        assert len(sizes) < 20
    assert sizes == sorted(set(sizes), reverse=True)
    assert largest(sizes[-1]) == max(lengths) or sizes[-1] <= max(lengths)
    if len(sizes) > 1:
        assert largest(sizes[1]) <= max(max(lengths), largest(sizes[0]))


@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
def test_activations_are_estimated_as_they_are(tiny: LoadedModel, checkpointing: str) -> None:
    """Estimated from one layer and two with 256 tokens at most; found at 700 tokens with all of a larger model."""
    config = tiny.model.config.__class__(**tiny.model.config.to_dict() | {"num_hidden_layers": 9, "hidden_size": 64})
    model = type(tiny.model)(config).eval()
    objective = CausalLM(model)
    data = examples(tiny)
    recipe = TrainingRecipe(gradient_checkpointing=checkpointing, micro_batch_tokens=700, precision="float32")
    plan = plan_memory(objective, data, recipe, longest=40)
    batch = memory._batch_of(data, 700, objective)

    def whole() -> None:
        with memory.gradient_checkpointing(model, checkpointing), objective.packing():
            objective.hidden_states(batch, input_ids=batch.input_ids[None]).square().mean().backward()

    whole()  # the gradients are there before what is measured
    found = memory._peak(batch, whole)
    assert plan.activations == pytest.approx(found, rel=0.1)


def test_the_parts_of_the_plan_are_what_they_say(tiny: LoadedModel) -> None:
    numbers = sum(parameter.numel() for parameter in tiny.model.parameters())
    data = examples(tiny)
    plans = {
        (precision, optimizer, ema): plan_memory(
            CausalLM(tiny.model),
            data,
            TrainingRecipe(precision=precision, optimizer=optimizer, ema_decay=ema, micro_batch_tokens=64),
            longest=40,
        )
        for precision in ("float32", "bfloat16")
        for optimizer in ("adamw", "adafactor")
        for ema in (None, 0.9)
    }
    assert plans["float32", "adamw", None].weights == 4 * numbers
    assert plans["float32", "adamw", 0.9].weights == 8 * numbers
    assert plans["bfloat16", "adamw", None].weights == 6 * numbers, "computing in bfloat16, masters in float32"
    assert plans["float32", "adamw", None].optimizer == 8 * numbers
    assert plans["float32", "adafactor", None].optimizer < 0.2 * numbers * 8
    assert plans["float32", "adamw", None].gradients == 4 * numbers
    widest = max(parameter.numel() for parameter in tiny.model.parameters())
    assert plans["bfloat16", "adamw", None].gradients == 2 * numbers + 4 * widest, "one is in float32 at a time"
    batches_of_two = TrainingRecipe(precision="bfloat16", batch_size=2, micro_batch_tokens=10)
    assert plan_memory(CausalLM(tiny.model), data, batches_of_two, longest=40).gradients == 4 * (numbers + widest)
    one = plans["float32", "adamw", None]
    parts = (one.program, one.weights, one.gradients, one.optimizer, one.activations, one.loss, one.gaps)
    assert one.total == sum(parts)
    glibc = platform.libc_ver()[0] == "glibc" and tiny.device.type == "cpu"
    assert one.gaps == pytest.approx(memory.HEAP_GAPS * one.activations if glibc else 0, abs=1)


def test_the_micro_batch_fits_into_the_memory_there_is(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = CausalLM(tiny.model)
    data = examples(tiny)
    monkeypatch.setattr(memory, "_measured", lambda *_: memory.Measured(fixed=0.0, each=1e6, fastest=4096))
    roomy = plan_memory(objective, data, TrainingRecipe(precision="float32"), longest=40)
    assert roomy.micro_batch_tokens == 4096
    rest = roomy.total - roomy.activations - roomy.gaps
    each = (roomy.activations + roomy.gaps) / 4096
    limit = (rest + 500 * each) / memory.HEADROOM / 1e9
    tight = plan_memory(objective, data, TrainingRecipe(precision="float32", memory_limit_gb=limit), longest=40)
    assert 400 <= tight.micro_batch_tokens <= 600
    none = plan_memory(objective, data, TrainingRecipe(precision="float32", memory_limit_gb=0.01), longest=40)
    assert none.micro_batch_tokens == 1, "each example by itself"
    assert none.total > none.available
    given = plan_memory(objective, data, TrainingRecipe(precision="float32", micro_batch_tokens=77), longest=40)
    assert given.micro_batch_tokens == 77


def test_what_was_measured_is_read_by_the_next_run(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    data = examples(tiny)
    first = plan_memory(CausalLM(tiny.model), data, TrainingRecipe(precision="float32", seed=1), longest=40)

    def not_again(*_: object) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(memory, "_measure", not_again)
    second = plan_memory(CausalLM(tiny.model), data, TrainingRecipe(precision="float32", seed=2), longest=40)
    assert second.micro_batch_tokens == first.micro_batch_tokens
    assert second.activations == first.activations


def test_measuring_leaves_no_gradients_and_no_changes(tiny: LoadedModel) -> None:
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    layers = list(decoder_layers(tiny.model))
    for precision in ("float32", "bfloat16"):
        memory._measure(CausalLM(tiny.model), examples(tiny), TrainingRecipe(precision=precision))
    assert list(decoder_layers(tiny.model)) == layers
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in tiny.model.state_dict().items())
    assert all("forward" not in vars(layer) for layer in decoder_layers(tiny.model))


@pytest.mark.parametrize("name", architectures(vocab_size=400, positions=256))
def test_any_architecture_is_measured_in_bfloat16(name: str, tiny: LoadedModel) -> None:
    """GPT-2 adds positions to embeddings, in whatever type they are."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architectures(vocab_size=400, positions=256)[name]).eval()
    objective = CausalLM(model)
    if objective.why_slow is None:
        found = memory._measure(objective, examples(tiny), TrainingRecipe(precision="bfloat16"))
        assert found.each > 0
        assert model.dtype == torch.float32


def test_remedies_are_those_that_are_not_taken_yet() -> None:
    plan = MemoryPlan(10**9, 4 * 10**9, 4 * 10**9, 8 * 10**9, 2 * 10**9, 10**8, 10**9, 8 * 10**9, 512)
    assert [line.split()[1] for line in plan.remedies(TrainingRecipe())] == ["qlora", "lora", "adamw-8bit", "full"]
    lora = plan.remedies(TrainingRecipe(method="lora", gradient_checkpointing="full", optimizer="lion"))
    assert [line.split()[1] for line in lora] == ["qlora"]
    assert any("together" in line and "20.10 GB" in line for line in plan.lines())


@pytest.mark.skipif(not can_prepack(), reason="this CPU has no bfloat16 products")
def test_kernels_of_shapes_seen_long_ago_are_not_kept() -> None:
    script = """
import torch
from finespun.training.memory import KERNELS_KEPT, tune_memory_use
tune_memory_use()
weight = torch.ones(32, 32, dtype=torch.bfloat16)
for last in (KERNELS_KEPT // 2, 2 * KERNELS_KEPT):
    for _ in range(2):
        print("round", flush=True)
        for rows in range(2, 2 + last):
            torch.nn.functional.linear(torch.ones(rows, 32, dtype=torch.bfloat16), weight)
"""
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"ONEDNN_VERBOSE": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    few, few_again, _, many_again = (part.count("create:cache_miss") for part in done.stdout.split("round\n")[1:])
    assert few > few_again == 0
    assert many_again >= memory.KERNELS_KEPT, "of twice as many, so many are gone at least"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process allocates")
def test_the_limit_makes_allocations_fail_as_a_lack_of_memory() -> None:
    code = """
import torch
from finespun.training.memory import is_out_of_memory, memory_limit
with memory_limit(2.0):
    torch.ones(10_000_000)
    try:
        torch.ones(1_000_000_000)
    except BaseException as error:
        print(is_out_of_memory(error))
torch.empty(600_000_000)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "True\n", done.stderr
    assert done.returncode == 0, done.stderr
