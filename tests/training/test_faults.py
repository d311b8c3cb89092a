"""What can go wrong while a run trains and saves: kills, full disks, lost permissions, numbers that are none."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import sentences
from finespun import finetuning
from finespun.errors import RunError, TrainingDiverged
from finespun.recipe import Recipe
from finespun.training import checkpoint, loop
from finespun.training.checkpoint import newest_checkpoint
from finespun.training.progress import Reporter

KILLS = 40

TRIALS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
sys.path.insert(0, sys.argv[3])
from finespun.data.readers import Origin
from finespun.recipe import Recipe
from finespun.training.checkpoint import newest_checkpoint
from finespun.training.loop import ResolvedTraining, train
from finespun.training.objectives.causal_lm import CausalLM
from finespun.training.progress import Reporter
from reference import tokenized

STEPS, KILLS = 400, int(sys.argv[2])

def run(folder, save_every=1):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, vocab_size=50, max_position_embeddings=32)).eval()
    examples = [tokenized([(7 * i + j) % 50 for j in range(5 + i % 7)], [0.0] + [1.0] * (4 + i % 7), Origin("t", i))
        for i in range(24)]
    recipe = Recipe.from_keywords(batch_size=4, learning_rate=1e-2, save_every=save_every, validate_every=7,
        micro_batch_tokens=20, keep_checkpoints=2, ema_decay=0.9, neftune_alpha=1.0, precision="float32",
        schedule="linear")
    train(model, CausalLM(model), examples, examples[:5], ResolvedTraining.from_recipe(recipe, STEPS), folder,
        lambda metrics: None, Reporter(quiet=True), newest_checkpoint(folder))
    return {name: value.clone() for name, value in model.state_dict().items()}

def forked(work):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child

base = Path(sys.argv[1])
kills, reached = 0, 0
draw = random.Random(5)
while True:
    child = forked(lambda: torch.save(run(base / "broken"), base / "broken.pt"))
    if kills < KILLS:
        time.sleep(draw.uniform(0.0, 0.35))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    kills += 1
    found = newest_checkpoint(base / "broken")
    step = found.state.step if found else 0
    assert step >= reached, f"a checkpoint was lost: {reached} was there, {step} is"
    reached = step
torch.save(run(base / "whole", save_every=STEPS), base / "whole.pt")
print(kills, reached)
"""


def test_killed_at_forty_random_points_and_resumed_it_ends_as_if_never_killed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRIALS, tmp_path, str(KILLS), Path(__file__).parents[1]],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kills, reached = map(int, done.stdout.split())
    assert kills >= 30, "the run must be long enough to be killed so often"
    assert reached > 0
    whole, broken = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "broken"))
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())
    assert not list((tmp_path / "broken").glob(".*")), "what killed saves left behind is cleared away"


def recipe(tiny_folder: Path, out: str) -> Recipe:
    Path("data.txt").write_text("\n".join(sentences(30)), encoding="utf-8")
    settings = {"epochs": 3, "batch_size": 2, "save_every": 2, "validate_every": 20, "learning_rate": 1e-3}
    settings["precision"] = "float32"  # on any machine, in a process of its own too
    return Recipe.from_keywords(model=str(tiny_folder), data="data.txt", out=out, count=0, **settings)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_disk_that_takes_no_checkpoint_ends_the_run_and_leaves_the_last_one(
    tiny_folder: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    finetuning.finetune(recipe(tiny_folder, "whole"), reporter=Reporter(quiet=True))
    save_file = checkpoint.save_file

    def fails(tensors: dict, path: Path) -> None:
        if "step-000006" in str(path) and path.name == "optimizer.safetensors":
            path.write_bytes(b"half of it")
            raise OSError(error, os.strerror(error))
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", fails)
        with pytest.raises(RunError, match="still valid"):
            finetuning.finetune(recipe(tiny_folder, "broken"), reporter=Reporter(quiet=True))
    assert newest_checkpoint(Path("broken/checkpoints")).state.step == 4
    assert [path.name for path in Path("broken/checkpoints").iterdir()] == ["step-000004"]
    finetuning.resume("broken", Reporter(quiet=True))
    assert Path("whole/model/model.safetensors").read_bytes() == Path("broken/model/model.safetensors").read_bytes()


def test_a_gradient_that_is_no_number_stops_the_run_before_the_weights_are_spoilt(
    tiny_folder: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate = loop.accumulate_gradients
    steps = []

    def spoilt(objective, *arguments) -> float:
        steps.append(len(steps))
        if len(steps) < 5:
            return accumulate(objective, *arguments)
        hook = next(objective.model.parameters()).register_hook(lambda gradient: gradient.fill_(float("nan")))
        try:
            return accumulate(objective, *arguments)
        finally:
            hook.remove()

    with monkeypatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", spoilt)
        with pytest.raises(TrainingDiverged, match="Step 5"):
            finetuning.finetune(recipe(tiny_folder, "broken"), reporter=Reporter(quiet=True))
    saved = newest_checkpoint(Path("broken/checkpoints"))
    assert saved.state.step == 4
    assert all(value.isfinite().all() for value in {**saved.weights(), **saved.moments()}.values())


def test_a_torn_checkpoint_is_passed_over_by_resume(tiny_folder: Path, in_tmp: Path) -> None:
    """As a machine that lost power may leave it, though each file was flushed."""
    finetuning.finetune(recipe(tiny_folder, "whole"), reporter=Reporter(quiet=True))
    settings = recipe(tiny_folder, "broken")
    settings.training.keep_checkpoints = 2
    finetuning.finetune(settings, reporter=Reporter(quiet=True))
    newest = max(Path("broken/checkpoints").iterdir())
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    Path("broken/report.html").unlink()
    said = []
    reporter = Reporter(quiet=True)
    reporter.say = said.append
    finetuning.resume("broken", reporter)
    steps = int(newest.name.removeprefix("step-"))
    assert f"Going on after step {steps - 1} of {steps}." in said
    assert Path("whole/model/model.safetensors").read_bytes() == Path("broken/model/model.safetensors").read_bytes()
