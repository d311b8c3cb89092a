from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import finespun
from conftest import sentences
from finespun.cli import main
from finespun.errors import DataError, RecipeError, RunError
from finespun.evaluation import kept
from finespun.evaluation.benchmark_model import BenchmarkModel, sampling_of
from finespun.evaluation.benchmarks import evaluate_benchmarks
from finespun.evaluation.kept import Kept
from finespun.evaluation.settings import BenchmarkSettings
from finespun.models.load import LoadedModel
from finespun.training.objectives.causal_lm import CausalLM
from finespun.training.progress import Reporter

QUIET = Reporter(quiet=True)

LINES = sentences(60)

QUESTIONS = [
    {
        "question": f"{LINES[number][:30]} {'雪' * (number % 3)}",
        "choices": [LINES[(number + shift) % 12][30:58] for shift in range(3)],
        "letter": "ABC"[number % 3],
        "answer": number % 3,
    }
    for number in range(12)
]
# the first is longer than the context, so that its beginning is left out and its text is read in windows
TEXTS = [
    {"text": " ".join(LINES[:20])},
    *({"text": line} for line in LINES[20:25]),
    {"text": "千山鸟飞绝，万径人踪灭。"},
]
SHORT = [{"ask": line[:20], "reply": line[20:30]} for line in LINES[25:31]]

TASKS: dict[str, dict[str, Any]] = {
    "own_choice": {
        "output_type": "multiple_choice",
        "rows": QUESTIONS,
        "doc_to_text": "Question: {{question}}\nAnswer: ",  # the space at the end goes to what follows
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "own_letters": {
        "output_type": "multiple_choice",
        "rows": QUESTIONS,
        "doc_to_text": "{{question}}\n{% for choice in choices %}{{'ABC'[loop.index0]}}. {{choice}}\n{% endfor %}Answer:",
        "doc_to_choice": ["A", "B", "C"],
        "doc_to_target": "letter",
        "metric_list": [{"metric": "acc"}],
    },
    "own_nothing_before": {
        "output_type": "multiple_choice",
        "rows": QUESTIONS,
        "doc_to_text": "",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "own_word": {
        "output_type": "loglikelihood",
        "rows": TEXTS,
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' ' + text.split(' ')[-1]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "own_texts": {
        "output_type": "loglikelihood_rolling",
        "rows": TEXTS,
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "own_reply": {
        "output_type": "generate_until",
        "rows": [*SHORT, {"ask": TEXTS[0]["text"], "reply": "x"}],
        "doc_to_text": "{{ask}}",
        "doc_to_target": "{{reply}}",
        "generation_kwargs": {"until": [" the", "\n\n"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}, {"metric": "bleu"}],
        "filter_list": [
            {"name": "strict", "filter": [{"function": "take_first"}]},
            {
                "name": "letters",
                "filter": [{"function": "regex", "regex_pattern": "([a-z]+)"}, {"function": "take_first"}],
            },
        ],
    },
}


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept from other tests, and lm-eval resamples in this process."""
    monkeypatch.setattr(kept, "data_cache", lambda: tmp_path / "cache")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


@pytest.fixture
def write_task(tmp_path: Path) -> Callable[..., Path]:
    """Writes a task with its data, and gives the folder of all tasks."""
    folder = tmp_path / "tasks"
    folder.mkdir()

    def write(name: str, **changes: Any) -> Path:
        task = TASKS.get(name, {}) | changes
        data = tmp_path / f"{name}.jsonl"
        rows = task.pop("rows", [])
        data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        files = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "datasets")}
        places = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "fewshot_split": "test"}
        config = {"task": name, **places, **task, "metadata": {"version": 1.0}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="module")
def sentence_piece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as tiny as the fixtures' whose tokenizer is made as Llama 2's: a space before each text, which is not
    shown, and BOS."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(200), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.pad_token = "</s>"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(fast),
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("models") / "sentence-piece"
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def of_lm_eval(model: Path, tasks: list[str], folder: Path, **settings: Any) -> dict[str, Any]:
    """What lm-eval finds through the models of transformers."""
    own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lm = HFLM(pretrained=own, tokenizer=AutoTokenizer.from_pretrained(model), batch_size=3, device="cpu")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(lm, tasks=tasks, task_manager=manager, **settings)


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def samples_of(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"samples_{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def close(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, float):
        if theirs > 1e6:  # the perplexity of long words is the exponential of what float32 has computed
            ours, theirs = math.log(ours), math.log(theirs)
        return math.isclose(ours, theirs, rel_tol=2e-5, abs_tol=1e-6)
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    if isinstance(theirs, str):
        return ours == theirs.rstrip("\ufffd")  # lm-eval leaves half a character at the end of a reply that is cut
    return ours == theirs


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("byte-level", {}),
        ("byte-level", {"num_fewshot": 2}),
        ("byte-level", {"num_fewshot": 1, "apply_chat_template": True}),
        ("sentence-piece", {"num_fewshot": 1}),
    ],
)
def test_every_answer_and_score_is_that_of_lm_eval_with_transformers(
    kind: str,
    settings: dict[str, Any],
    tiny_folder: Path,
    sentence_piece_folder: Path,
    write_task: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = tiny_folder if kind == "byte-level" else sentence_piece_folder
    for name in TASKS:
        folder = write_task(name)
    names = list(TASKS)
    if settings.get("apply_chat_template"):
        names.remove("own_nothing_before")  # its question is then a turn of its own
    expected = of_lm_eval(model, names, folder, **settings)
    found = evaluate_benchmarks(
        str(model),
        BenchmarkSettings(tasks=names, tasks_folder=folder, **settings),
        out=tmp_path / "out",
        reporter=QUIET,
    )
    for name in names:
        theirs = expected["samples"][name]
        ours = samples_of(found, name)
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            assert one["arguments"] == json.loads(json.dumps(other["arguments"])), name
            assert close(one["resps"], other["resps"]), (name, one["resps"], other["resps"])
    results = results_of(found)
    for name in names:
        for key, value in expected["results"][name].items():
            assert close(results["results"][name][key], value), (name, key)
    assert results["n-shot"] == expected["n-shot"]


def test_smollm2_s_table_is_lm_eval_s_to_the_last_digit(
    smollm2_folder: Path, write_task: Callable[..., Path], tmp_path: Path
) -> None:
    names = ["own_choice", "own_letters", "own_texts", "own_reply"]
    for name in names:
        write_task(name)
    # a perplexity of thousands has more digits in the table than float32 has; the bits per byte of these texts are
    # 1.74865, where its rounding decides the last one
    folder = write_task("own_texts", metric_list=[{"metric": "byte_perplexity"}])
    expected = of_lm_eval(smollm2_folder, names, folder, num_fewshot=1)
    found = evaluate_benchmarks(
        str(smollm2_folder),
        BenchmarkSettings(tasks=names, tasks_folder=folder, num_fewshot=1),
        out=tmp_path / "out",
        reporter=QUIET,
    )
    assert make_table(results_of(found)) == make_table(expected)


def test_a_group_is_a_table_of_its_own_with_lm_eval_s_figures(
    tiny_folder: Path, write_task: Callable[..., Path], tmp_path: Path
) -> None:
    write_task("own_choice")
    folder = write_task("own_letters", rows=QUESTIONS[:7])
    weighed = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = {"group": "both", "task": ["own_choice", "own_letters"], "aggregate_metric_list": [weighed]}
    (folder / "both.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    expected = of_lm_eval(tiny_folder, ["both"], folder)["results"]["both"]
    found = evaluate_benchmarks(
        str(tiny_folder), BenchmarkSettings(tasks=["both"], tasks_folder=folder), out=tmp_path / "out", reporter=QUIET
    )
    lines = summary_of(found)["metrics"]
    assert [(line["task"], line["depth"]) for line in lines] == [
        ("both", 0),
        ("own_choice", 1),
        ("own_choice", 1),
        ("own_letters", 1),
    ]
    assert lines[0]["value"] == pytest.approx(expected["acc,none"])
    assert lines[0]["stderr"] == pytest.approx(expected["acc_stderr,none"])
    # an interval from all 19 questions is about 2 × 2 standard errors wide
    assert lines[0]["high"] - lines[0]["low"] == pytest.approx(4.2 * lines[0]["stderr"], rel=0.3)
    assert "  own_letters" in (found / "report.html").read_text(encoding="utf-8")


def test_an_interrupted_evaluation_asks_only_what_is_left(
    tiny_folder: Path, write_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("own_choice", "own_reply"):
        folder = write_task(name)
    settings = BenchmarkSettings(tasks=["own_choice", "own_reply"], tasks_folder=folder)
    monkeypatch.setattr("finespun.evaluation.benchmark_model.MICRO_BATCH_TOKENS", 200)
    add, added = Kept.add, []

    def interrupted(self: Kept, key: str, value: Any) -> None:
        if len(added) == 20:
            raise KeyboardInterrupt
        added.append(key)
        add(self, key, value)

    monkeypatch.setattr(Kept, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_benchmarks(str(tiny_folder), settings, out=tmp_path / "out", reporter=QUIET)
    assert not (tmp_path / "out").exists()
    later: list[str] = []
    monkeypatch.setattr(Kept, "add", lambda self, key, value: (later.append(key), add(self, key, value)))
    evaluate_benchmarks(str(tiny_folder), settings, out=tmp_path / "out", reporter=QUIET)
    assert len({*added, *later}) == len(added) + len(later) == 36 + 7
    monkeypatch.setattr(CausalLM, "logits", None)  # nothing is asked a second time
    evaluate_benchmarks(str(tiny_folder), settings, out=tmp_path / "again", reporter=QUIET)
    assert summary_of(tmp_path / "again")["metrics"] == summary_of(tmp_path / "out")["metrics"]


def test_answers_in_letters_are_read_off_one_pass(
    tiny_folder: Path, write_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = []
    logits = CausalLM.logits

    def spied(self: CausalLM, batch: Any, places: Any) -> Any:
        tokens.append(batch.tokens)
        return logits(self, batch, places)

    monkeypatch.setattr(CausalLM, "logits", spied)
    settings = BenchmarkSettings(tasks=["own_letters"], tasks_folder=write_task("own_letters"))
    found = evaluate_benchmarks(str(tiny_folder), settings, out=tmp_path / "out", reporter=QUIET)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    questions = [sample["arguments"][0][0] for sample in samples_of(found, "own_letters")]
    read = [tuple(tokenizer.encode(f"{question} {letter}")[-129:-1]) for question in questions for letter in "ABC"]
    assert sum(tokens) == sum(map(len, {*read})) < sum(map(len, read))


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, trained on the answers of the questions."""
    folder = tmp_path_factory.mktemp("run")
    texts = [f"Question: {row['question']}\nAnswer: {row['choices'][row['answer']]}" for row in QUESTIONS]
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    out = folder / "run"
    finespun.finetune(
        model=str(tiny_folder),
        data={"source": [str(data)], "validation": 0.0},
        out=str(out),
        epochs=60,
        batch_size=12,
        learning_rate=1e-2,
        samples={"count": 0},
        quiet=True,
    )
    return out


def test_the_command_shows_a_run_beside_its_base(
    run: Path,
    tiny_folder: Path,
    write_task: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_task("own_choice")
    folder = write_task("own_texts")
    command = ["evaluate", str(run), "--tasks", "own_choice,own_texts", "--tasks-folder", str(folder), "--base"]
    main([*command, "--name", "beside"])
    captured = capsys.readouterr()
    found = run / "evaluations" / "beside"
    summary = summary_of(found)
    tuned, below = (
        np.array([sample["acc"] for sample in samples_of(place, "own_choice")]) for place in (found, found / "base")
    )
    (difference,) = [each for each in summary["base"]["differences"] if each["name"] == "acc"]
    assert difference["value"] > 0
    assert difference["value"] == pytest.approx((tuned - below).mean())
    # paired: as wide as 2 × 2 standard errors of the differences on single questions
    error = (tuned - below).std(ddof=1) / math.sqrt(len(tuned))
    assert difference["high"] - difference["low"] == pytest.approx(4.4 * error, rel=0.25)
    assert of_lm_eval(tiny_folder, ["own_choice"], folder)["results"]["own_choice"]["acc,none"] == pytest.approx(
        below.mean()
    )
    lines = captured.out.splitlines()
    assert lines[0].split() == [
        "n-shot",
        "metric",
        *[str(run)],
        "stderr",
        "95",
        "%",
        "interval",
        str(tiny_folder),
        "difference",
    ]
    assert lines[1].split()[:4] == ["own_choice", "0", "acc", f"{tuned.mean():.4f}"]
    assert lines[-1] == f"Report: {found / 'report.html'}"
    assert "bootstrapping" not in captured.out + captured.err
    assert "Running" not in captured.err  # lm-eval's bars are not shown
    assert "aggregation" not in captured.err  # nor what it warns of
    page = (found / "report.html").read_text(encoding="utf-8")
    assert f"{tuned.mean():.4f}" in page
    assert f"{below.mean():.4f}" in page


def test_another_evaluation_is_not_written_over(
    tiny_folder: Path, write_task: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_task("own_letters")
    settings = BenchmarkSettings(tasks=["own_letters"], tasks_folder=folder)
    out = tmp_path / "out"
    evaluate_benchmarks(str(tiny_folder), settings, limit=3, out=out, reporter=QUIET)
    assert len(samples_of(out, "own_letters")) == 3
    assert "first 3 questions" in summary_of(out)["notes"][0]
    with pytest.raises(RunError, match=r"benchmarks\.limit 3 → not set"):
        evaluate_benchmarks(str(tiny_folder), settings, out=out, reporter=QUIET)


def test_a_question_that_is_sampled_several_times_gets_several_answers(
    tiny_folder: Path, write_task: Callable[..., Path], tmp_path: Path
) -> None:
    sampled = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    folder = write_task("own_reply", rows=SHORT, generation_kwargs=sampled, repeats=3)
    settings = BenchmarkSettings(tasks=["own_reply"], tasks_folder=folder)
    answers = [
        [
            sample["resps"][0]
            for sample in samples_of(
                evaluate_benchmarks(str(tiny_folder), settings, out=tmp_path / name, reporter=QUIET), "own_reply"
            )
        ]
        for name in ("one", "two")
    ]
    assert answers[0] == answers[1]
    assert all(len({*each}) == 3 for each in answers[0])


def test_what_a_task_says_about_generation() -> None:
    given = {"until": ["</s>", "", "Q:"], "do_sample": True, "top_k": 0, "top_p": 0.9, "max_new_tokens": 7}
    sampling = sampling_of(given, "own")
    assert sampling.changed(*type(sampling).model_fields) == ["max_new_tokens", "temperature", "top_p", "stop"]
    assert (sampling.max_new_tokens, sampling.temperature, sampling.stop) == (7, 1.0, ["</s>", "Q:"])
    greedy = sampling_of({"until": "\n", "temperature": 0.7, "do_sample": False, "num_beams": 3}, "own")
    assert (greedy.temperature, greedy.beams, greedy.max_new_tokens, greedy.stop) == (0.0, 3, 256, ["\n"])
    with pytest.raises(RecipeError, match="own: has the generation setting penalty_alpha"):
        sampling_of({"penalty_alpha": 0.6}, "own")


def test_a_special_token_among_the_stops_ends_a_text(
    tiny: LoadedModel, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    """It is never in the text, so that it would not be found there."""
    model = BenchmarkModel(tiny, "weights", QUIET)
    assert set(model._stopping_at(["<|im_start|>", "Q:"]).stop_ids) == {
        small_tokenizer.eos_token_id,
        small_tokenizer.bos_token_id,
    }
    assert small_tokenizer.bos_token_id not in model._stopping_at(["Q:"]).stop_ids


def test_what_cannot_be_run_is_said(tiny_folder: Path, write_task: Callable[..., Path], tmp_path: Path) -> None:
    nowhere = {"data_files": {"test": str(tmp_path / "nowhere.jsonl")}}
    folder = write_task("own_missing", **TASKS["own_reply"], dataset_kwargs=nowhere)
    write_task("own_code", **TASKS["own_reply"], unsafe_code=True)
    write_task("own_long", **TASKS["own_reply"] | {"generation_kwargs": {"until": [], "max_gen_toks": 128}})

    def evaluated(*tasks: str, **settings: Any) -> None:
        given = BenchmarkSettings(tasks=list(tasks), tasks_folder=folder, **settings)
        evaluate_benchmarks(str(tiny_folder), given, out=tmp_path / "out", reporter=QUIET)

    with pytest.raises(DataError, match="own_missing: its data are not on this machine and cannot be fetched"):
        evaluated("own_missing")
    with pytest.raises(RecipeError, match="own_code: runs code that the model writes"):
        evaluated("own_code")
    with pytest.raises(RecipeError, match="own_long: asks for up to 128 new tokens, and the model's context is 128"):
        evaluated("own_long")
    with pytest.raises(RecipeError, match="name at least one benchmark"):
        evaluated()
    assert not (tmp_path / "out").exists()


def test_a_name_that_no_task_has_is_answered_with_those_like_it(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(tiny_folder), "--out", str(tmp_path / "out"), "--tasks", "hellaswagg"])
    assert ended.value.code == 2
    assert "have no task 'hellaswagg'. Names like it are hellaswag," in capsys.readouterr().err


def test_without_lm_eval_the_extra_is_named(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match=r"pip install 'finespun\[benchmarks\]'"):
        evaluate_benchmarks(str(tiny_folder), BenchmarkSettings(tasks=["hellaswag"]))


@pytest.mark.parametrize("option", [["--data", "test.jsonl"], ["--metrics", "BLEU"], ["--max-new-tokens", "9"]])
def test_what_is_for_own_test_data_is_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "somewhere", "--tasks", "hellaswag", *option])
    assert f"{option[0]}: is for test data of your own" in capsys.readouterr().err
