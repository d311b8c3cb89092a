"""Generation speed beside its peers: same model, same prompts, greedy or by beams, one after another in processes of
their own.

    python benchmarks/generation_throughput.py --data test.jsonl [--model smollm2-135m] [--prompts 200] [--new-tokens 64]
        [--at-once N] [--beams N] [--contestants "finespun" "transformers, 16" …] [--repeat 1]

`--data` is a JSONL file with `prompt`; prompts are drawn at random, and given all at once or, with `--at-once`, N at a
time. Contestants:

finespun            its engine, in the precision it chooses here
transformers, N     its `generate` in batches of N prompts of similar length, filled up on the left, in that precision
llama.cpp engine    what `finespun serve --engine llama.cpp` runs, with a GGUF file at Q8_0
llama.cpp           the same file in llama.cpp's server, called over HTTP by itself

tokens/s    new tokens, end-of-text tokens not counted, by the time from ids to ids
same        share of the prompts whose text is the one that finespun wrote

What counts are the ratios; absolute numbers are of one machine on one day.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SEED = 0


def prompts_of(arguments: argparse.Namespace, encoder: Any) -> list[list[int]]:
    with arguments.data.open(encoding="utf-8") as file:
        rows = [json.loads(line)["prompt"] for line in file]
    if arguments.prompts < len(rows):
        rows = random.Random(SEED).sample(rows, arguments.prompts)
    return [encoder.encode_prompt(row) for row in rows]


def one(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One contestant, in this process."""
    import torch

    from finespun.data.templates import Encoder
    from finespun.generation.engine import Completion, generate
    from finespun.generation.settings import Sampling
    from finespun.models.load import load_model

    by_llama_cpp = name.startswith("llama.cpp")
    loaded = load_model(arguments.model, "float32" if by_llama_cpp else None)
    encoder = Encoder(loaded.tokenizer)
    prompts = prompts_of(arguments, encoder)
    model, new = loaded.causal_lm, arguments.new_tokens

    def ours(part: list[list[int]]) -> list[tuple[str, int]]:
        found = generate(loaded, encoder, part, Sampling(max_new_tokens=new, beams=arguments.beams))
        return [(completion.text, completion.completion_tokens) for (completion,) in found]

    @torch.inference_mode()
    def theirs(part: list[list[int]]) -> list[tuple[str, int]]:
        size, stop = int(name.split(", ")[1]), list(encoder.stop_ids)
        found: dict[int, tuple[str, int]] = {}
        order = sorted(range(len(part)), key=lambda number: -len(part[number]))
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            width = max(len(part[number]) for number in batch)
            ids = torch.tensor([[stop[0]] * (width - len(part[number])) + part[number] for number in batch])
            mask = torch.tensor([[0] * (width - len(part[number])) + [1] * len(part[number]) for number in batch])
            made = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=new,
                do_sample=False,
                num_beams=arguments.beams,
                eos_token_id=stop,
                pad_token_id=stop[0],
            )
            for number, row in zip(batch, made[:, width:].tolist(), strict=True):
                end = next((place for place, token in enumerate(row) if token in stop), len(row))
                found[number] = (encoder.decode(row[:end]), end)
        return [found[number] for number in range(len(part))]

    at_once = arguments.at_once or len(prompts)
    if by_llama_cpp:
        from finespun.serving.llama_cpp import LlamaCpp, gguf_of

        file = gguf_of(arguments.model, encoder, "q8_0")
        slots = min(at_once, 64)
    if name == "llama.cpp engine":
        engine = LlamaCpp(file, loaded.context_length, slots)
    if name == "llama.cpp":
        import httpx
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.port, parameters.verbosity = str(file), 0, 1
        parameters.n_parallel, parameters.n_ctx = slots, loaded.context_length * min(slots, 4)
        server = xllamacpp.Server(parameters)
        client = httpx.Client(base_url=server.listening_address, timeout=None)

    def by_engine(part: list[list[int]]) -> list[tuple[str, int]]:
        ends: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in part]
        for prompt, end in zip(part, ends, strict=True):
            engine.start(prompt, Sampling(max_new_tokens=new), 0, end.put)
        return [until_end(end) for end in ends]

    def until_end(end: queue.SimpleQueue[Any]) -> tuple[str, int]:
        while not isinstance(event := end.get(), Completion):
            if isinstance(event, Exception):
                raise event
        return event.text, event.completion_tokens

    def directly(part: list[list[int]]) -> list[tuple[str, int]]:
        with ThreadPoolExecutor(len(part)) as pool:
            return list(pool.map(ask, part))

    def ask(prompt: list[int]) -> tuple[str, int]:
        body = {"prompt": prompt, "n_predict": new, "temperature": 0}
        answer = client.post("/completion", json=body).json()
        return answer["content"], answer["tokens_predicted"] - (answer["stop_type"] == "eos")

    ways = {"finespun": ours, "llama.cpp engine": by_engine, "llama.cpp": directly}
    write = ways.get(name, theirs)
    write(prompts[:2])  # the first pass of a process is slower
    started = time.perf_counter()
    found = [text for first in range(0, len(prompts), at_once) for text in write(prompts[first : first + at_once])]
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "tokens": sum(tokens for _, tokens in found),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "precision": "q8_0" if by_llama_cpp else str(model.dtype).removeprefix("torch."),
        "texts": [text for text, _ in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--at-once", type=int)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--contestants", nargs="+", default=["finespun", *(f"transformers, {n}" for n in (16, 32, 64))])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments)))
        return
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.contestants}
    for _ in range(arguments.repeat):
        for name in arguments.contestants:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--one", name], stdout=subprocess.PIPE, text=True, check=True
            )
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, {k: v for k, v in results[name][-1].items() if k != "texts"}, file=sys.stderr)
    report(results, arguments)


def report(results: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    ours = results["finespun"]
    together = f", {arguments.at_once} at once" if arguments.at_once else ""
    together += f", {arguments.beams} beams" if arguments.beams > 1 else ""
    print(f"\n{arguments.model}, {arguments.prompts} prompts of {arguments.data.name}{together}\n")
    print("| | precision | tokens/s, median (all) | finespun is faster by | same | peak MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, runs in results.items():
        speeds = [run["tokens"] / run["seconds"] for run in runs]
        pairs = zip(ours, speeds, strict=True)
        ratio = statistics.median(our["tokens"] / our["seconds"] / speed for our, speed in pairs)
        equal = statistics.mean(a == b for a, b in zip(ours[0]["texts"], runs[0]["texts"], strict=True))
        every = ", ".join(f"{speed:.1f}" for speed in speeds)
        peak = statistics.median(run["peak"] for run in runs)
        print(
            f"| {name} | {runs[0]['precision']} | {statistics.median(speeds):.1f} ({every}) | {ratio:.2f}× | {equal:.0%} | {peak:.0f} |"
        )


if __name__ == "__main__":
    main()
