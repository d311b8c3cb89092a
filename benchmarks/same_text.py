"""The same prompts, greedily, on every road from a run to a text: how many texts are those of the library.

    python benchmarks/same_text.py [RUN] [--prompts test.jsonl] [--count 50] [--new-tokens 48] [--roads library CLI …]

`RUN` is a run folder with a LoRA adapter that was trained in float32; without it one is trained here, for a few steps on
the fables that come with finespun. `--prompts` is a JSONL file with `prompt`; without it the prompts are those of the
fables. Each road computes in float32, but for GGUF files in fewer bits.

equal       texts that are those of the library, to the character
differs at  the first token that is another one, median over the texts that differ
margin      there: how much likelier the library's token was than the next best one for the library, in nats, median and
            largest over the texts that differ. Below the table stands what margins are at all tokens. Where the two best
            tokens are closer than a road rounds, either can come first

Servers are processes of their own and get 16 requests at once through OpenAI's client. For llama.cpp by itself,
template and tokenizer are those in the GGUF file, and keys and values are in float32. What is not installed is left out,
and said.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

import finespun

AT_ONCE = 16

ALIVE: list[Any] = []
"""Servers of llama.cpp in this process, whose end can wait for ever; the process ends without it."""


@dataclass
class Asked:
    """What is written with, and after what."""

    run: Path
    folder: Path
    prompts: list[str]
    new_tokens: int
    chat: bool

    @property
    def adapter(self) -> Path:
        return self.run / "model"


@dataclass
class Reference:
    """A text of the library: its ids, and of each how much likelier it was than the next best, in nats."""

    text: str
    ids: list[int]
    margins: list[float]


def library(asked: Asked) -> list[str]:
    return finespun.load(asked.run).generate(asked.prompts, max_new_tokens=asked.new_tokens)


def references(asked: Asked) -> list[Reference]:
    found = []
    for (completion,) in finespun.load(asked.run).complete(asked.prompts, max_new_tokens=asked.new_tokens, logprobs=2):
        tokens = completion.logprobs or ()
        margins = [token.top[0][2] - token.top[1][2] for token in tokens]
        found.append(Reference(completion.text, [token.id for token in tokens], margins))
    return found


def command_line(asked: Asked) -> list[str]:
    file = asked.folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked.prompts), encoding="utf-8")
    line = ["generate", str(asked.run), "--prompts-file", str(file), "--max-new-tokens", str(asked.new_tokens)]
    done = subprocess.run([sys.executable, "-m", "finespun", *line], stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(row)["text"] for row in done.stdout.splitlines()]


def server(*options: str, merged: bool = False) -> Callable[[Asked], list[str]]:
    def written(asked: Asked) -> list[str]:
        source = merged_folder(asked) if merged else asked.run
        line = [sys.executable, "-m", "finespun", "serve", f"m={source}", "--port", "0", *options]
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                assert process.stdout is not None
                announced = process.stdout.readline()  # Serving m at http://…/v1
                return by_client(announced.split()[-1], asked)
            finally:
                process.terminate()

    return written


def by_client(address: str, asked: Asked) -> list[str]:
    import openai

    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=1200)

    def one(prompt: str) -> str:
        common: dict[str, Any] = {"model": "m", "max_tokens": asked.new_tokens, "temperature": 0}
        if not asked.chat:
            return client.completions.create(prompt=prompt, **common).choices[0].text
        messages: Any = [{"role": "user", "content": prompt}]
        return client.chat.completions.create(messages=messages, **common).choices[0].message.content or ""

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, asked.prompts))


def merged_folder(asked: Asked) -> Path:
    return exported(asked, "merged")


def merged(asked: Asked) -> list[str]:
    from transformers import AutoModelForCausalLM

    folder = merged_folder(asked)
    return by_transformers(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), folder, asked)


def rounded(asked: Asked) -> list[str]:
    """What is lost in an F16 file, and nothing else: the rounding of its matrices, computed with in float32."""
    from transformers import AutoModelForCausalLM

    folder = merged_folder(asked)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.half().float()
    return by_transformers(model, folder, asked)


def adapter(asked: Asked) -> list[str]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finespun.models.catalog import locate
    from finespun.models.load import base_of, read_origin

    base = locate(base_of(asked.adapter, read_origin(asked.adapter))).path
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), str(asked.adapter))
    return by_transformers(model, asked.adapter, asked)


def by_transformers(model: Any, folder: Path, asked: Asked) -> list[str]:
    """One prompt at a time, with the tokenizer in `folder` and what ends a text there or, for an adapter, in the merged
    folder."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    stop = GenerationConfig.from_pretrained(merged_folder(asked)).eos_token_id
    found = []
    for prompt in asked.prompts:
        if asked.chat:
            said = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        else:
            ids = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            row = model.generate(**ids, max_new_tokens=asked.new_tokens, do_sample=False, eos_token_id=stop)[0]
        found.append(tokenizer.decode(row[ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def gguf(kind: str) -> Callable[[Asked], list[str]]:
    def written(asked: Asked) -> list[str]:
        return by_llama_cpp(exported(asked, "gguf", "--type", kind) / "model.gguf", asked)

    return written


def by_llama_cpp(file: Path, asked: Asked) -> list[str]:
    """One prompt at a time, which llama.cpp puts through the template of the file and tokenizes itself."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.verbosity = 1
    parameters.n_ctx = 2048
    parameters.n_parallel = 1
    parameters.warmup = parameters.fit_params = False
    parameters.cache_ram_mib = 0
    # its threads wait for each other busily, and for ever where other programs want the cores
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    running = xllamacpp.Server(parameters)
    ALIVE.append(running)
    path = "/v1/chat/completions" if asked.chat else "/v1/completions"
    found = []
    for prompt in asked.prompts:
        said = {"messages": [{"role": "user", "content": prompt}]} if asked.chat else {"prompt": prompt}
        body = {"max_tokens": asked.new_tokens, "temperature": 0, "cache_prompt": False, **said}
        choice = httpx.post(running.listening_address + path, json=body, timeout=None).json()["choices"][0]
        found.append(choice["message"]["content"] if asked.chat else choice["text"])
    return found


def exported(asked: Asked, target: str, *options: str) -> Path:
    folder = asked.folder / "-".join([target, *options[1:]])
    if not folder.is_dir():
        line = ["export", str(asked.run), "--to", target, "--out", str(folder), *options]
        subprocess.run([sys.executable, "-m", "finespun", *line], stdout=subprocess.DEVNULL, check=True)
    return folder


ROADS: dict[str, tuple[Callable[[Asked], list[str]], str | None]] = {
    "library": (library, None),
    "CLI": (command_line, None),
    "server": (server("--precision", "float32"), None),
    "server, llama.cpp, F32": (server("--engine", "llama.cpp", "--quantization", "f32"), "xllamacpp"),
    "server, vLLM, merged": (server("--engine", "vllm", "--precision", "float32", merged=True), "vllm"),
    "merged, transformers": (merged, None),
    "adapter, peft": (adapter, None),
    "GGUF F32, llama.cpp": (gguf("f32"), "xllamacpp"),
    "GGUF F16, llama.cpp": (gguf("f16"), "xllamacpp"),
    "merged, rounded to F16, transformers": (rounded, None),
    "GGUF Q8_0, llama.cpp": (gguf("q8_0"), "xllamacpp"),
}
"""Each road, and what has to be installed for it."""


def in_its_own_process(road: str, asked: Asked) -> list[str]:
    """What one road writes. Its process begins with nothing and leaves nothing behind."""
    file = asked.folder / "texts.json"
    process = multiprocessing.get_context("spawn").Process(target=write_texts, args=(road, asked, file))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{road}: failed with exit code {process.exitcode}")
    return json.loads(file.read_text(encoding="utf-8"))


def write_texts(road: str, asked: Asked, file: Path) -> None:
    file.write_text(json.dumps(ROADS[road][0](asked)), encoding="utf-8")
    os._exit(0)


def difference(reference: Reference, text: str, decode: Callable[[Sequence[int]], str]) -> int:
    """The place of the first token that is another one; behind the last, where only the end is."""
    for place in range(len(reference.ids)):
        if not text.startswith(decode(reference.ids[: place + 1]).rstrip("\ufffd")):
            return place
    return len(reference.ids)


def row(name: str, texts: Sequence[str], expected: Sequence[Reference], decode: Callable[[Sequence[int]], str]) -> str:
    differing = [(one, text) for one, text in zip(expected, texts, strict=True) if one.text != text]
    equal = f"{len(expected) - len(differing)} of {len(expected)}"
    if not differing:
        return f"| {name} | {equal} | | |"
    places = [difference(one, text, decode) for one, text in differing]
    margins = [
        one.margins[place] for (one, _), place in zip(differing, places, strict=True) if place < len(one.margins)
    ]
    said = f"{statistics.median(margins):.4f}; {max(margins):.4f}" if margins else "at the end"
    return f"| {name} | {equal} | {statistics.median(places):.0f} | {said} |"


FABLES = Path(finespun.__file__).parent / "data" / "fables"


def train(folder: Path) -> Path:
    rows = [
        {"prompt": f"Write a fable titled {row['title']}.", "completion": row["fable"]}
        for row in rows_of(FABLES / "train.jsonl")[:24]
    ]
    options = {"method": "lora", "max_steps": 6, "learning_rate": 2e-3, "batch_size": 2, "precision": "float32"}
    finespun.finetune(model="smollm2-135m", data=rows, samples={"count": 0}, out=str(folder), quiet=True, **options)
    return folder


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def prompts_of(file: Path | None, count: int) -> list[str]:
    if file:
        return [row["prompt"] for row in rows_of(file)][:count]
    rows = [*rows_of(FABLES / "validation.jsonl"), *rows_of(FABLES / "train.jsonl")]
    return [f"Write a fable titled {row['title']}." for row in rows][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--roads", nargs="+", default=list(ROADS), choices=list(ROADS))
    arguments = parser.parse_args()

    from finespun.data.templates import Encoder
    from finespun.models.load import load_tokenizer, read_origin

    with tempfile.TemporaryDirectory(prefix="same-text-") as name:
        folder = Path(name)
        run = arguments.run or train(folder / "run")
        if read_origin(run / "model").get("precision") != "float32":
            parser.error(f"{run}: is no run that was trained in float32 (--training.precision float32).")
        encoder = Encoder(load_tokenizer(str(run))[0])
        prompts = prompts_of(arguments.prompts, arguments.count)
        asked = Asked(run, folder, prompts, arguments.new_tokens, encoder.prompt_format != "raw")
        expected = references(asked)
        print("| road | equal | differs at | margin |\n| --- | --- | --- | --- |")
        for road in arguments.roads:
            needed = ROADS[road][1]
            if needed and not (shutil.which(needed) or importlib.util.find_spec(needed)):
                print(f"| {road} | {needed} is not installed | | |", flush=True)
                continue
            print(row(road, in_its_own_process(road, asked), expected, encoder.decode), flush=True)
    margins = sorted(margin for one in expected for margin in one.margins)
    shares = ", ".join(
        f"{sum(m < limit for m in margins) / len(margins):.2%} below {limit}" for limit in (0.001, 0.01, 0.1)
    )
    print(
        f"\n{len(prompts)} prompts, {len(margins)} tokens. Margins: median {statistics.median(margins):.2f}; {shares}."
    )


if __name__ == "__main__":
    main()
