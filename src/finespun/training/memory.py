"""How much memory training takes, how many tokens are best computed at once, and what happens when it is too much."""

from __future__ import annotations

import ctypes
import os
import platform
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count, dropwhile
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finespun.data.packing import PackedBatch, pack
from finespun.data.templates import TokenizedExample
from finespun.files import data_cache, hash_of, remembered
from finespun.models.gradient_checkpointing import decoder_layers, gradient_checkpointing
from finespun.models.linear_cross_entropy import CHUNK_BYTES, rows_of_chunk
from finespun.recipe import Optimizer, TrainingRecipe
from finespun.training.objectives.causal_lm import CausalLM

SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Micro-batches to choose from, in tokens."""

EFFICIENT = 0.95
"""The micro-batch is the smallest of these that spends so much of its time on its tokens. The rest is what each one
costs whatever its size: adding up gradients that are as large as the model."""

HEADROOM = 0.9
"""Share of the free memory that a plan uses: what is freed is not always where it is needed."""

HEAP_GAPS = 0.5
"""Bytes between blocks that glibc leaves unused, for each byte of activations. Its aligned allocation, which is what
torch asks for, does not find the gap that a freed block of the same size left. Measured: 0.3 to 0.9."""

STATE_BYTES: dict[Optimizer, float] = {
    "adamw": 8,
    "adamw-8bit": 2.03,
    "adafactor": 0.02,
    "muon": 4,
    "lion": 4,
    "schedule-free-adamw": 8,
}
"""Bytes that an optimizer remembers for each number in a weight matrix."""


KERNELS_KEPT = 256
"""By oneDNN: about 1 MB each, built in less than 1 ms."""


def tune_memory_use() -> None:
    """What this process does with memory that it has used, on a CPU; to be called before its first matrix product.

    glibc keeps large blocks that are freed for the next ones, where it would return each to the kernel and take page
    faults for it again at every step (mallopt(3): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD). oneDNN keeps
    `KERNELS_KEPT` of those that it builds for each shape of a bfloat16 product, where it would keep 1,024, which texts
    and batches of all lengths fill (ONEDNN_PRIMITIVE_CACHE_CAPACITY, left as it is where it is set)."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))
    if _has_glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, 2**31 - 1)


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def memory_in_use(device: torch.device) -> int:
    """Bytes that this process has on `device`: for a CPU its resident set."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def memory_available(device: torch.device, limit_gb: float | None) -> int:
    """Bytes that this process can have on `device`, what it has already included."""
    limit = int(limit_gb * 1e9) if limit_gb else 1 << 62
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return min(limit, free + torch.cuda.memory_reserved(device))
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    container = Path("/sys/fs/cgroup/memory.max")
    if container.is_file() and (text := container.read_text(encoding="ascii").strip()).isdigit():
        free = min(free, int(text))
    return min(limit, free)


@contextmanager
def memory_limit(gigabytes: float | None) -> Generator[None]:
    """Inside, allocations beyond so many GB (of 10⁹ bytes) fail: on a GPU, and on Linux for the process."""
    if gigabytes is None:
        yield
        return
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    try:
        import resource

        before = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 1e9), before[1]))
    except (ImportError, AttributeError, ValueError, OSError):
        yield  # a system without such a limit: the micro-batch alone keeps it
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch says so on a CPU only in words."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def smaller_micro_batch(batch: Sequence[TokenizedExample], size: int) -> int | None:
    """Half of what was computed at once when `batch` was taken in parts of at most `size` tokens; None where that was
    one example alone."""
    longest = max(len(example.input_ids) for example in batch)
    if size <= longest or len(batch) == 1:
        return None
    return max(longest, min(size, sum(len(example.input_ids) for example in batch)) // 2)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that training takes, by part, and those that there are; and the micro-batch that was chosen for it."""

    program: int
    """Python, the libraries and the data: what the process has beside the model."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What a micro-batch keeps for its backward pass, at the most."""
    loss: int
    gaps: int
    """What lies unused between the blocks of the activations."""
    available: int
    micro_batch_tokens: int

    @property
    def total(self) -> int:
        parts = self.program, self.weights, self.gradients, self.optimizer, self.activations, self.loss, self.gaps
        return sum(parts)

    def lines(self) -> list[str]:
        """The plan for a person, part by part."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            f"activations of {self.micro_batch_tokens:,} tokens at once": self.activations,
            "loss": self.loss,
            "gaps between them": self.gaps,
            "program and data": self.program,
            "together": self.total,
            "available": self.available,
        }
        width = max(len(name) for name in parts)
        return [f"  {name:<{width}} {size / 1e9:7.2f} GB" for name, size in parts.items()]

    def remedies(self, recipe: TrainingRecipe) -> list[str]:
        """What would make less of it, with about how much, the largest first."""
        found = {
            "training.gradient_checkpointing full": (self.activations + self.gaps) * 0.8,
            "training.optimizer adamw-8bit": self.optimizer * 0.75,
            "training.method lora": (self.gradients + self.optimizer) * 0.98,
            "training.method qlora": (self.gradients + self.optimizer) * 0.98 + self.weights * 0.7,
        }
        settled = {
            "training.gradient_checkpointing full": recipe.gradient_checkpointing == "full",
            "training.optimizer adamw-8bit": recipe.optimizer != "adamw",
            "training.method lora": recipe.method != "full",
            "training.method qlora": recipe.method not in ("full", "lora"),
        }
        left = sorted(((size, name) for name, size in found.items() if not settled[name]), reverse=True)
        return [f"{name} saves about {size / 1e9:.1f} GB" for size, name in left]


@dataclass(frozen=True)
class Measured:
    """What a forward and backward pass took here. The bytes of one of n tokens are `fixed + each * n`."""

    fixed: float
    each: float
    fastest: int
    """Tokens above which a larger micro-batch is hardly faster."""


def plan_memory(
    objective: CausalLM, examples: Sequence[TokenizedExample], recipe: TrainingRecipe, longest: int
) -> MemoryPlan:
    """What training `objective` takes by `recipe`, in which precision and method have been decided. The micro-batch is
    the recipe's, or the fastest that fits into memory; the `longest` example may be longer."""
    parameters = list(objective.outer.parameters())
    device = parameters[0].device
    have = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    compute = 2 if recipe.precision == "bfloat16" else 4
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    numbers = sum(parameter.numel() for parameter in trained)
    # quantized weights stay as they are; the masters of what is trained in bfloat16 come beside it
    will_have = sum(
        parameter.numel() * (compute if parameter.is_floating_point() else parameter.element_size())
        for parameter in parameters
    )
    weights = will_have + (4 * numbers if compute == 2 else 0) + (4 * numbers if recipe.ema_decay else 0)
    optimizer = sum(
        parameter.numel() * (STATE_BYTES[recipe.optimizer] if parameter.ndim >= 2 else 8) for parameter in trained
    )
    program = max(0, memory_in_use(device) - have)
    measured = _of_one(objective, examples) if objective.why_slow else _measured(objective, examples, recipe)
    available = memory_available(device, recipe.memory_limit_gb)
    widest = max((parameter.numel() for parameter in trained), default=0)
    # in float32 once they are sums, of several micro-batches; on the way to the optimizer each parameter's is
    sums = 4 * numbers + (4 * widest if compute == 2 else 0)
    room = HEADROOM * available - program - weights - sums - optimizer - _loss_bytes(objective, SIZES[-1], compute)
    gaps = HEAP_GAPS if device.type == "cpu" and _has_glibc() else 0.0
    fitting = int((room / (1 + gaps) - measured.fixed) / max(1.0, measured.each))
    chosen = recipe.micro_batch_tokens or max(1, min(measured.fastest, fitting))
    of_batch = _largest_batch(examples, recipe.batch_size) if recipe.batch_size else chosen
    at_once = max(longest, min(chosen, of_batch))
    activations = measured.fixed + measured.each * at_once
    return MemoryPlan(
        program=program,
        weights=weights,
        gradients=sums if of_batch > chosen else sums - (4 - compute) * numbers,
        optimizer=int(optimizer),
        activations=int(activations),
        loss=_loss_bytes(objective, int(at_once * _share_with_loss(examples)), compute),
        gaps=int(gaps * activations),
        available=available,
        micro_batch_tokens=chosen,
    )


def _loss_bytes(objective: CausalLM, tokens: int, compute: int) -> int:
    """What logits and gradients of embeddings and head take for so many tokens with loss, in numbers of `compute`
    bytes."""
    modules: Any = objective.model.get_output_embeddings(), objective.model.get_input_embeddings()
    head, table = (module.weight for module in modules)
    logits = min(CHUNK_BYTES, tokens * len(head) * compute)
    of_head = (compute if tokens <= rows_of_chunk(head) else 4) * head.numel() if head.requires_grad else 0
    return logits + of_head + (compute * table.numel() if table.requires_grad else 0)


def _sample(examples: Sequence[TokenizedExample]) -> Sequence[TokenizedExample]:
    return examples[:100]


def _largest_batch(examples: Sequence[TokenizedExample], batch_size: int) -> int:
    """Tokens of about the largest of some dozen batches: two standard deviations above the mean."""
    lengths = [len(example.input_ids) for example in _sample(examples)]
    return int(batch_size * fmean(lengths) + 2 * batch_size**0.5 * pstdev(lengths))


def _share_with_loss(examples: Sequence[TokenizedExample]) -> float:
    sample = _sample(examples)
    return sum(example.trained_tokens for example in sample) / sum(len(example.input_ids) for example in sample)


def _average_length(examples: Sequence[TokenizedExample]) -> int:
    sample = _sample(examples)
    return sum(len(example.input_ids) for example in sample) // len(sample)


def _of_one(objective: CausalLM, examples: Sequence[TokenizedExample]) -> Measured:
    """For a model that computes examples one by one: what the first of them takes, by its tokens."""
    batch = _batch_of(examples, min(len(examples[0].input_ids), SIZES[0]), objective)
    peak = _peak(batch, lambda: objective(batch).weighted_sum.backward())
    objective.outer.zero_grad(set_to_none=True)
    return Measured(fixed=0.0, each=peak / batch.tokens, fastest=1)


def _measured(objective: CausalLM, examples: Sequence[TokenizedExample], recipe: TrainingRecipe) -> Measured:
    """Measures once for a model on a machine; later runs read it, so that they also cut their batches alike."""
    device = next(objective.model.parameters()).device
    depends_on = [
        objective.model.config.to_dict(),
        sum(parameter.numel() for parameter in objective.outer.parameters() if parameter.requires_grad),
        [recipe.method, recipe.precision, recipe.gradient_checkpointing],
        _average_length(examples).bit_length(),
        [str(device), torch.get_num_threads(), torch.__version__, platform.node()],
    ]
    place = data_cache() / "speed" / f"{hash_of(depends_on)}.json"
    return Measured(**remembered(place, lambda: asdict(_measure(objective, examples, recipe))))


def _measure(objective: CausalLM, examples: Sequence[TokenizedExample], recipe: TrainingRecipe) -> Measured:
    """Bytes by the last layer and the last two, which stand for all: they are alike. Time by two micro-batches of
    different size."""
    dtype = getattr(torch, recipe.precision or "float32")
    copied = objective.computing_in(dtype)
    layers = decoder_layers(copied.decoder)
    # layers before the first that is trained keep nothing
    begins_with = copied.model.get_input_embeddings(), *layers
    kept = min(len(layers), sum(1 for _ in dropwhile(lambda module: not _has_gradient(module), begins_with)))
    small, large = SIZES[0] // 2, SIZES[0]
    tried = deepcopy(layers[-2:])
    with _layers(copied.decoder, tried), gradient_checkpointing(tried, recipe.gradient_checkpointing):
        _pass(copied, _batch_of(examples, small, copied), tried)
        peaks = {
            (number, batch.tokens): _peak(batch, partial(_pass, copied, batch, tried[-number:]))
            for batch in (_batch_of(examples, size, copied) for size in (small, large))
            for number in (1, 2)
        }
        one, two = ((peaks[number, large] - peaks[number, small]) / (large - small) for number in (1, 2))
    with gradient_checkpointing(copied.decoder, recipe.gradient_checkpointing):
        fastest = _fastest(copied, examples)
    objective.outer.zero_grad(set_to_none=True)
    return Measured(fixed=max(0.0, peaks[1, small] - one * small), each=one + (two - one) * (kept - 1), fastest=fastest)


def _fastest(objective: CausalLM, examples: Sequence[TokenizedExample]) -> int:
    """The smallest micro-batch that is efficient, from a line through the times of two."""
    more = 16 if objective.model.device.type == "cuda" else 1  # a GPU is not busy with so few
    small, large = SIZES[0] // 2 * more, SIZES[0] * 3 // 2 * more
    try:
        _seconds(objective, _batch_of(examples, small, objective))  # the first pass of a process is slower
        batches = [_batch_of(examples, size, objective) for size in (small, large)]
        times = [min(_seconds(objective, batch) for _ in range(3)) for batch in batches]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return SIZES[0]
    each = max(1e-9, (times[1] - times[0]) / (large - small))
    constant = max(0.0, times[0] - each * small)
    return next((size for size in SIZES if each * size >= EFFICIENT * (each * size + constant)), SIZES[-1])


def _seconds(objective: CausalLM, batch: PackedBatch) -> float:
    started = time.perf_counter()
    with objective.packing():
        objective(batch).weighted_sum.backward()
    if batch.input_ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _has_gradient(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _batch_of(examples: Sequence[TokenizedExample], tokens: int, objective: CausalLM) -> PackedBatch:
    """Examples, again and again, until they have so many tokens; the last one is cut."""
    chosen: list[TokenizedExample] = []
    for number in count():
        if tokens <= 0:
            break
        example = examples[number % len(examples)]
        chosen.append(
            replace(example, input_ids=example.input_ids[:tokens], loss_weights=example.loss_weights[:tokens])
        )
        tokens -= len(example.input_ids)
    return pack(chosen).to(next(objective.model.parameters()).device)


def _pass(objective: CausalLM, batch: PackedBatch, layers: torch.nn.ModuleList) -> None:
    """Forward and backward through `layers` alone; the gradients stay, as they do in a step."""
    embeddings = objective.model.get_input_embeddings()(batch.input_ids[None]).detach()
    dtype = next(parameter.dtype for parameter in layers.parameters() if parameter.is_floating_point())
    embeddings = embeddings.to(dtype).requires_grad_()
    with _layers(objective.decoder, layers), objective.packing():
        hidden = objective.hidden_states(batch, inputs_embeds=embeddings)
        hidden.square().mean().backward()


def _peak(batch: PackedBatch, work: Callable[[], None]) -> int:
    """Bytes that `work` on `batch` has at the most beside what was there before."""
    if batch.input_ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with _Allocations() as allocations:
        work()
    return allocations.peak


class _Allocations(TorchDispatchMode):
    """Follows the storages that torch's operations make and drop; `peak` is the most bytes that were there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if _has_storage(leaf)}
        for leaf in tree_leaves(result):
            if _has_storage(leaf):
                storage = leaf.untyped_storage()
                place = storage.data_ptr()
                if place not in given and place not in self._known:  # neither a view nor changed in place
                    self._known.add(place)
                    self._now += storage.nbytes()
                    self.peak = max(self.peak, self._now)
                    weakref.finalize(storage, self._freed, place, storage.nbytes())
        return result

    def _freed(self, place: int, size: int) -> None:
        self._known.discard(place)
        self._now -= size


def _has_storage(leaf: Any) -> bool:
    return type(leaf) in (torch.Tensor, torch.nn.Parameter) and leaf.layout == torch.strided


@contextmanager
def _layers(decoder: torch.nn.Module, layers: torch.nn.ModuleList) -> Generator[None]:
    """Inside, `decoder` is made of `layers` instead of its own."""
    own = decoder_layers(decoder)
    name = next(name for name, module in decoder.named_modules() if module is own)
    parent, attribute = decoder.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    setattr(parent, attribute, layers)
    try:
        yield
    finally:
        setattr(parent, attribute, own)
