"""The eleven things that must be true of training; each test is named after the fault it would find."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import finespun
from conftest import sentences
from finespun import finetuning
from finespun.data.formats import Message, MessagesExample, PromptExample, TextExample
from finespun.data.packing import step_indices
from finespun.data.readers import BadRow, Origin
from finespun.data.templates import Encoder, LengthLimit
from finespun.data.texts import HELD_OUT, read_texts
from finespun.errors import TrainingInterrupted
from finespun.models.load import LoadedModel, load_model
from finespun.recipe import Recipe
from finespun.runs import RunFolder
from finespun.training.loop import accumulate_gradients, example_losses, weighted_mean
from finespun.training.objectives.causal_lm import CausalLM
from finespun.training.progress import Reporter
from finespun.training.schedule import learning_rate, total_steps
from reference import encoded, gradients, losses_one_by_one, tokenized
from scipy_free import chi_square_p

HERE = Origin("test", 1)


# 1


@pytest.mark.parametrize(
    ("example", "prompt_format"),
    [
        (TextExample("the old ferryman", HERE), "raw"),
        (PromptExample("the old", " ferryman", HERE), "raw"),
        (PromptExample("the old", "ferryman", HERE), "chat"),
        (
            MessagesExample(
                (Message(role="user", content="who?"), Message(role="assistant", content="the ferryman")), HERE
            ),
            "chat",
        ),
    ],
)
def test_01_eos_is_trained_though_it_is_the_padding_token(
    small_tokenizer: PreTrainedTokenizerFast, example, prompt_format
) -> None:
    assert small_tokenizer.pad_token_id == small_tokenizer.eos_token_id
    (tokens,) = Encoder(small_tokenizer, prompt_format).encode_example(example)
    assert tokens.input_ids[-1] == small_tokenizer.eos_token_id
    assert tokens.loss_weights[-1] == 1.0


def test_01_a_trained_model_stops_by_itself(tiny_folder: Path, in_tmp: Path) -> None:
    rows = [{"prompt": "the old ferryman", "completion": "rowed over the slow river and said nothing"}] * 8
    model = finespun.finetune(
        model=str(tiny_folder), data=rows, validation=0, epochs=30, learning_rate=0.01, batch_size=4, quiet=True
    )
    (completion,) = model.complete(["the old ferryman"], max_new_tokens=60)[0]
    assert completion.text == rows[0]["completion"]
    assert completion.finish_reason == "stop"


# 2


@pytest.fixture
def bos_tokenizer(small_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> PreTrainedTokenizerFast:
    """Adds BOS to each text by itself, and its chat template writes BOS too, as Llama's do."""
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + str(small_tokenizer.chat_template)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


# in a chat message a special token is refused, see data/test_templates.py
@pytest.mark.parametrize(("prompt_format", "prompt"), [("raw", "the old"), ("raw", "<s>the old"), ("chat", "the old")])
def test_02_there_is_never_a_second_bos(bos_tokenizer: PreTrainedTokenizerFast, prompt_format, prompt: str) -> None:
    encoder = Encoder(bos_tokenizer, prompt_format)
    (example,) = encoder.encode_example(PromptExample(prompt, "ferryman", HERE))
    for ids in (encoder.encode_prompt(prompt), example.input_ids):
        assert list(ids).count(bos_tokenizer.bos_token_id) == 1
        assert ids[0] == bos_tokenizer.bos_token_id


# 3 and 5


@pytest.mark.parametrize("micro_batch_tokens", [1, 60, 10_000])
def test_03_05_packing_and_splitting_a_batch_change_neither_loss_nor_gradient(
    tiny: LoadedModel, micro_batch_tokens: int
) -> None:
    tiny.model.double()
    examples = encoded(tiny)
    total, weight = losses_one_by_one(tiny.model, examples)
    (total / weight).backward()
    expected = gradients(tiny.model)

    objective = CausalLM(tiny.model)
    assert objective.why_slow is None
    loss = accumulate_gradients(objective, examples, micro_batch_tokens)

    assert loss == pytest.approx(float(total) / weight, rel=1e-6)
    found = gradients(tiny.model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # loss weights are float32, so their quotient with the total weight is exact to 1e-7 only
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-5, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_03_a_long_example_counts_by_its_tokens_not_as_one_of_two(tiny: LoadedModel) -> None:
    short, long = (
        tokenized([5, 6, 7], [0, 1, 1], HERE),
        tokenized(list(range(10, 50)), [0.0] + [1.0] * 39, HERE),
    )
    objective = CausalLM(tiny.model)
    sums, weights = example_losses(objective, [short, long], 1)
    together = accumulate_gradients(objective, [short, long], 1)
    assert together == pytest.approx(sum(sums) / 41, rel=1e-5)
    assert together != pytest.approx((sums[0] / weights[0] + sums[1] / weights[1]) / 2, rel=1e-3)


# 4


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.text(alphabet=st.sampled_from("theoldfryman \n.你好🙂é"), min_size=1, max_size=20),
    completion=st.text(min_size=1, max_size=20).filter(lambda text: "<|im_" not in text),  # refused: a turn's end
)
@pytest.mark.parametrize("prompt_format", ["raw", "chat"])
def test_04_a_prompt_has_the_same_ids_in_training_as_at_generation(
    small_tokenizer, prompt_format, prompt: str, completion: str
) -> None:
    encoder = Encoder(small_tokenizer, prompt_format)
    ids = encoder.encode_prompt(prompt)
    (example,) = encoder.encode_example(PromptExample(prompt, completion, HERE))
    assert example.input_ids[: len(ids)].tolist() == ids
    assert not any(example.loss_weights[: len(ids)])
    assert all(example.loss_weights[len(ids) :])
    assert encoder.decode(example.input_ids[len(ids) :]) == completion


def test_04_a_boundary_that_would_merge_is_kept(small_tokenizer: PreTrainedTokenizerFast) -> None:
    together = small_tokenizer("ferryman")["input_ids"]
    encoder = Encoder(small_tokenizer, "raw")
    (example,) = encoder.encode_example(PromptExample("ferry", "man", HERE))
    apart = small_tokenizer("ferry")["input_ids"] + small_tokenizer("man")["input_ids"]
    assert together != apart, "the tokenizer must merge these for the test to mean anything"
    assert example.input_ids[:-1].tolist() == apart


# 6


def test_06_what_a_length_limit_cuts_is_counted() -> None:
    examples = [
        tokenized(list(range(10)), [0.0] + [1.0] * 9, HERE),
        tokenized([1, 2, 3], [0, 1, 1], HERE),
    ]
    for action, beginning in (("cut", 0), ("cut-left", 4)):
        limit = LengthLimit(6, action)
        ((long,), (short,)) = [limit.fit(example) for example in examples]
        assert long.input_ids.tolist() == list(range(beginning, beginning + 6))
        assert long.loss_weights.tolist() == [0, 1, 1, 1, 1, 1]
        assert short is examples[1]
        assert (limit.longest, limit.count, limit.tokens_lost) == (10, 1, 4)


def test_06_an_example_cut_to_nothing_trainable_is_refused_or_skipped_by_choice() -> None:
    prompt_only = tokenized(list(range(10)), [0.0] * 8 + [1.0] * 2, HERE)
    refused = LengthLimit(6, "cut").fit(prompt_only)
    assert isinstance(refused, BadRow)
    assert "leave nothing to train" in refused.reason
    skipping = LengthLimit(6, "skip")
    assert skipping.fit(prompt_only) == []
    assert skipping.count == 1
    ((end,),) = [LengthLimit(6, "cut-left").fit(prompt_only)]
    assert end.trained_tokens == 2


@given(length=st.integers(2, 60), size=st.integers(8, 20), overlap=st.integers(0, 6))
def test_06_splitting_a_text_trains_each_token_once(length: int, size: int, overlap: int) -> None:
    example = tokenized(list(range(length)), [0.0] + [1.0] * (length - 1), HERE)
    parts = LengthLimit(size, "split", overlap).fit(example)
    for part, following in pairwise(parts):
        assert part.input_ids[-max(1, overlap) :].tolist() == following.input_ids[: max(1, overlap)].tolist()
    trained = [
        token for part in parts for token, weight in zip(part.input_ids, part.loss_weights, strict=True) if weight
    ]
    assert trained == list(range(1, length))
    assert all(len(part.input_ids) <= size and part.loss_weights[0] == 0 for part in parts)


# 7


@given(count=st.integers(1, 50), batch_size=st.integers(1, 16), seed=st.integers(0, 3))
def test_07_each_pass_trains_each_example_once_with_the_last_batch(count: int, batch_size: int, seed: int) -> None:
    steps = total_steps(count, batch_size, epochs=2)
    batches = step_indices(count, batch_size, seed)
    taken = [next(batches) for _ in range(steps)]
    half = steps // 2
    for part in (taken[:half], taken[half:]):
        assert sorted(index for batch in part for index in batch) == list(range(count))
    resumed = step_indices(count, batch_size, seed, start=half + 1)
    if half + 1 < steps:
        assert next(resumed) == taken[half + 1]


@pytest.mark.parametrize("shift", [0, 16], ids=["seeds", "large seeds"])
def test_07_each_seed_has_an_order_of_its_own(shift: int) -> None:
    """Which of six examples comes first is uniform over seeds."""
    first = Counter(next(step_indices(6, 6, seed << shift))[0] for seed in range(3000))
    assert chi_square_p([first[index] for index in range(6)], [1 / 6] * 6) > 1e-4


def test_07_the_schedule_ends_with_the_true_last_step() -> None:
    rates = [learning_rate(step, 20, 1.0, 0.1, "cosine", 0.2) for step in range(20)]
    assert rates[:2] == [0.5, 1.0]
    assert max(rates) == 1.0
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert learning_rate(20, 20, 1.0, 0.1, "cosine", 0.2) == pytest.approx(0)


# 8


TRAINING = {"epochs": 4, "batch_size": 2, "save_every": 3, "validate_every": 5, "learning_rate": 1e-3}


def train_in(folder: Path, tiny_folder: Path, method: str, out: str) -> Recipe:
    data = folder / "data.txt"
    data.write_text("\n".join(sentences(30)), encoding="utf-8")
    return Recipe.from_keywords(
        model=str(tiny_folder), data=str(data), out=out, method=method, count=0, precision="float32", **TRAINING
    )


def assert_same_runs(one: Path, other: Path) -> None:
    """The same weights and optimizer to the bit, and the same losses at each step."""
    last = max(path.name for path in (one / "checkpoints").iterdir())
    names = [path.relative_to(one) for path in (one / "model").glob("*.safetensors")]
    names += [Path("checkpoints", last, file) for file in ("weights.safetensors", "optimizer.safetensors")]
    assert len(names) == 3
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    losses = [
        [(line["step"], line["loss"], line.get("validation_loss")) for line in RunFolder(run).metrics()]
        for run in (one, other)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("method", "number"), [("full", signal.SIGTERM), ("lora", signal.SIGINT)])
def test_08_stopped_by_a_signal_and_resumed_equals_uninterrupted(
    tiny_folder: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, method: str, number: signal.Signals
) -> None:
    finetuning.finetune(train_in(in_tmp, tiny_folder, method, "whole"), reporter=Reporter(quiet=True))
    append = RunFolder.append_metrics

    def append_and_stop(self: RunFolder, metrics: dict) -> None:
        append(self, metrics)
        if metrics["step"] == 11:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", append_and_stop)
        with pytest.raises(TrainingInterrupted, match="finespun train --resume broken"):
            finetuning.finetune(train_in(in_tmp, tiny_folder, method, "broken"), reporter=Reporter(quiet=True))
    assert len(RunFolder(Path("broken")).metrics()) == 11
    assert not Path("broken/model").exists()
    finetuning.resume("broken", Reporter(quiet=True))
    assert_same_runs(Path("whole"), Path("broken"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_08_killed_between_checkpoints_and_resumed_equals_uninterrupted(
    tiny_folder: Path, in_tmp: Path, method: str
) -> None:
    finetuning.finetune(train_in(in_tmp, tiny_folder, method, "whole"), reporter=Reporter(quiet=True))
    (in_tmp / "recipe.yaml").write_text(train_in(in_tmp, tiny_folder, method, "broken").to_yaml())
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "finespun", "train", "recipe.yaml"], stderr=subprocess.PIPE, text=True, env=environment
    )
    metrics = Path("broken/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not metrics.is_file() or metrics.read_text().count("\n") < 11:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not Path("broken/model").exists(), "the run must not have been over before it was killed"
    finetuning.resume("broken", Reporter(quiet=True))
    assert_same_runs(Path("whole"), Path("broken"))


def test_08_the_stored_recipe_runs_again_to_the_bit(tiny_folder: Path, in_tmp: Path) -> None:
    rows = [{"prompt": text, "completion": text[::-1]} for text in sentences(20)]
    first = finespun.finetune(model=str(tiny_folder), data=rows, out="first", quiet=True, count=0, **TRAINING)
    finetuning.finetune(Recipe.load(first.run.recipe_file, {"out": "again"}), reporter=Reporter(quiet=True))
    assert_same_runs(Path("first"), Path("again"))


# 9


def test_09_tied_embeddings_stay_tied(tiny_folder: Path, in_tmp: Path) -> None:
    def tied(folder: str | Path) -> bool:
        model = AutoModelForCausalLM.from_pretrained(folder)
        return model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()

    def stored(folder: Path) -> set[str]:
        with safe_open(folder / "model.safetensors", "pt") as file:
            return set(file.keys())

    assert tied(tiny_folder)
    model = finespun.load(tiny_folder).finetune(sentences(12), max_steps=3, quiet=True)
    assert "lm_head.weight" not in stored(model.run.model)
    assert tied(model.run.model)
    adapted = finespun.load(tiny_folder).finetune(sentences(12), max_steps=3, method="lora", quiet=True)
    adapted.save("merged", merge_adapter=True)
    assert "lm_head.weight" not in stored(Path("merged"))
    assert tied("merged")


# 10


@pytest.mark.parametrize("method", ["full", "lora"])
def test_10_greedy_text_is_the_same_on_every_road(smollm2_folder: Path, in_tmp: Path, method: str) -> None:
    rows = [
        {"prompt": f"Say {word}.", "completion": f"I say {word}, and {word} again."}
        for word in ("boat", "mill", "heron", "river")
    ]
    quick = {"micro_batch_tokens": 512, "save_every": 3, "quiet": True}
    model = finespun.load("smollm2-135m").finetune(
        rows, max_steps=3, batch_size=4, learning_rate=1e-3, method=method, validation=0, **quick
    )
    prompts = ["Say boat.", "Say ferryman.", "What is a mill?"]
    expected = model.generate(prompts, max_new_tokens=24)
    assert len(set(expected)) == 3

    assert [model.generate(prompt, max_new_tokens=24) for prompt in prompts] == expected, "alone instead of in a batch"
    assert finespun.load(model.run.path).generate(prompts, max_new_tokens=24) == expected, "loaded from the run"

    tokenizer = AutoTokenizer.from_pretrained(model.run.model)
    if method == "lora":
        from peft import AutoPeftModelForCausalLM

        plain = AutoPeftModelForCausalLM.from_pretrained(model.run.model)
        model.save("merged", merge_adapter=True)
        assert finespun.load("merged").generate(prompts, max_new_tokens=24) == expected, "merged"
        merged = AutoModelForCausalLM.from_pretrained("merged")
        assert [plain_greedy(merged, tokenizer, prompt) for prompt in prompts] == expected, (
            "merged, in plain transformers"
        )
    else:
        plain = AutoModelForCausalLM.from_pretrained(model.run.model)
    assert [plain_greedy(plain, tokenizer, prompt) for prompt in prompts] == expected, "in plain transformers or peft"


def plain_greedy(model, tokenizer, prompt: str) -> str:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# 11


def test_11_validation_is_whole_token_weighted_and_without_dropout(small_tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=len(small_tokenizer),
        n_positions=128,
        resid_pdrop=0.5,
        embd_pdrop=0.5,
        attn_pdrop=0.5,
    )
    model = GPT2LMHeadModel(config).eval()
    encoder = Encoder(small_tokenizer, "raw")
    examples = [
        encoder.encode_example(TextExample(text * (1 + i % 3), HERE))[0] for i, text in enumerate(sentences(11))
    ]
    with torch.no_grad():
        total, weight = losses_one_by_one(model, examples)
    for micro_batch_tokens in (1, 50, 10_000):
        assert weighted_mean(example_losses(CausalLM(model), examples, micro_batch_tokens)) == pytest.approx(
            float(total) / weight, rel=1e-5
        )


def test_11_the_reported_validation_loss_is_that_of_the_saved_model(tiny_folder: Path, in_tmp: Path) -> None:
    model = finespun.load(tiny_folder).finetune(
        sentences(40), validation=0.3, max_steps=6, validate_every=2, batch_size=8, quiet=True
    )
    run = model.run
    best = min(line["validation_loss"] for line in run.metrics() if "validation_loss" in line)
    reloaded = load_model(str(run.path))
    encoder = Encoder(reloaded.tokenizer)
    held_out = [example for _, example in read_texts(run.recipe().data).examples(HELD_OUT)]
    assert len(held_out) == run.manifest()["data"]["validation"] > 3
    loss, weight = losses_one_by_one(reloaded.model, [encoder.encode_example(example)[0] for example in held_out])
    assert best == pytest.approx(float(loss.detach()) / weight, rel=1e-5)
    assert run.manifest()["results"]["perplexity_after"]["value"] == pytest.approx(
        torch.tensor(best).exp().item(), rel=1e-4
    )
