"""GGUF files against llama.cpp itself: what it reads, tokenizes and says must be what transformers does."""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

import finespun
from conftest import sentences
from finespun.data.templates import Encoder
from finespun.errors import ModelError, RunError
from finespun.export.gguf import ARCHITECTURES, write_gguf
from finespun.export.gguf_quantization import QUANTIZATIONS
from finespun.models.adapters import add_lora
from finespun.models.catalog import KNOWN_MODELS, package_file
from finespun.models.load import LoadedModel, load_model
from finespun.recipe import LoraRecipe

xllamacpp = pytest.importorskip("xllamacpp")

TEXTS = [
    "The old ferryman's boat wasn't there; he'd rowed over.",
    "江雪：千山鸟飞绝，万径人踪灭。",
    "🙂👩‍👩‍👧 naïve café — “quoted” … ½ ² Ⅳ",
    "def f(x):\n\treturn x ** 2  # squared\n\n\nprint(f(3.14159))\r\n",
    "1984 12345678 3,000,000 v2.0.1 0x1F",
    "   three spaces before,  two inside, and four at the end    ",
    "line\n\n  indented 42\n \n\ttab 7",
    "",
    " ",
    "Größe ΑΒΓ абв אבג हिन्दी ไทย 한국어 カタカナ",
]


class LlamaCpp:
    """llama.cpp with one file, asked over HTTP. Its cache of keys and values is in float32, as transformers' is."""

    def __init__(self, file: Path, context: int = 256) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.hostnames = ["127.0.0.1"]
        params.port = 0
        params.verbosity = 1
        params.n_ctx = context
        params.n_parallel = 1
        params.warmup = False
        params.fit_params = False
        params.cache_ram_mib = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(params)
        self._address = self._server.listening_address
        self.greedy([1], 1)  # a server that ends before it has begun to work waits for ever

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def greedy(self, ids: Sequence[int], new: int) -> dict[str, Any]:
        """`tokens`, `content` (their text) and `stop_type` of what comes after `ids`."""
        return self.ask(
            "/completion",
            prompt=list(ids),
            n_predict=new,
            temperature=0,
            return_tokens=True,
            cache_prompt=False,
        )

    def log_probabilities(self, ids: Sequence[int], vocabulary: int) -> torch.Tensor:
        """Of each next token after `ids`: `[vocabulary]`. What is sampled is forced to be a token that is a whole
        character, since the probabilities of others are not sent."""
        answer = self.ask(
            "/completion",
            prompt=list(ids),
            n_predict=1,
            temperature=0,
            n_probs=vocabulary,
            logit_bias=[[ids[0], 1e6]],
            cache_prompt=False,
        )
        found = torch.full((vocabulary,), -torch.inf)
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found

    def loss(self, ids: Sequence[int]) -> float:
        """Mean negative log-likelihood of each of `ids` but the first, in nats."""
        total = 0.0
        for at in range(1, len(ids)):
            answer = self.ask(
                "/completion", prompt=list(ids[:at]), n_predict=1, n_probs=1, logit_bias=[[ids[at], 1e6]], temperature=0
            )
            (said,) = answer["completion_probabilities"]
            assert said["id"] == ids[at]
            total -= said["logprob"]
        return total / (len(ids) - 1)


def random_model(kind: str, tokenizer: PreTrainedTokenizerFast, extra_rows: int = 0, **options: Any) -> LoadedModel:
    """A model of the architecture `kind`, small, with random weights large enough that each part of it counts."""
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer) + extra_rows,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    if kind == "gpt2":
        settings["n_positions"] = settings.pop("max_position_embeddings")
        del settings["intermediate_size"], settings["num_key_value_heads"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings | options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            vector = parameter.dim() == 1 and name.endswith("weight")
            parameter.normal_(mean=0.7 if vector else 0.0, std=0.3 if vector else 0.15)
        model.get_output_embeddings().weight[tokenizer.eos_token_id] = 0  # so that it does not end at once
    return LoadedModel(model, tokenizer, f"random-{kind}", Path())


def transformers_greedy(model: Any, ids: Sequence[int], new: int) -> list[int]:
    with torch.no_grad():
        output = model.generate(
            torch.tensor([ids]), max_new_tokens=new, do_sample=False, attention_mask=torch.ones(1, len(ids))
        )
    return output[0, len(ids) :].tolist()


GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True, "sliding_window": 24}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, with biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 32, "num_key_value_heads": 1}),
    "llama 3.1": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "gpt2": ("gpt2", {"tie_word_embeddings": True}),
    "gpt2, untied": ("gpt2", {"n_inner": 96}),
    "qwen2": ("qwen2", {}),
    "qwen2, yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**GEMMA, "num_hidden_layers": 4, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "gemma3_text",
        {
            **GEMMA,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
        },
    ),
    "phi3": ("phi3", {}),
    "phi3, long": (
        "phi3",
        {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.3, 1.7, 2.0, 2.5, 3.0],
                "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
                "original_max_position_embeddings": 256,
            },
        },
    ),
}  # fmt: skip


def test_each_architecture_has_a_shape() -> None:
    assert {kind for kind, _ in SHAPES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_computes_what_transformers_does(shape: str, small_tokenizer, tmp_path: Path) -> None:
    kind, options = SHAPES[shape]
    loaded = random_model(kind, small_tokenizer, extra_rows=7, **options)
    write_gguf(loaded, tmp_path / "model.gguf", "f32", [small_tokenizer.eos_token_id])
    llama_cpp = LlamaCpp(tmp_path / "model.gguf")
    ids = small_tokenizer(" ".join(sentences(9)))["input_ids"][:60]
    vocabulary = loaded.model.config.vocab_size
    for length in (1, 20, 60):
        with torch.no_grad():
            expected = loaded.model(torch.tensor([ids[:length]])).logits[0, -1].log_softmax(0)
        found = llama_cpp.log_probabilities(ids[:length], vocabulary)
        assert expected.max() - expected.min() > 3  # it does say something
        # llama.cpp looks GELU up in a table of float16
        torch.testing.assert_close(
            found, expected, atol=2e-2 if "gelu" in ARCHITECTURES[kind].activation else 1e-4, rtol=0
        )
    assert llama_cpp.greedy(ids[:20], 16)["tokens"] == transformers_greedy(loaded.model, ids[:20], 16)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_file_read_back_has_the_same_weights(kind: str, small_tokenizer, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tie_word_embeddings": kind.startswith("gemma")}
    if kind.startswith("gemma"):
        options |= {"head_dim": 16, "query_pre_attn_scalar": 16}
    elif kind == "qwen3":
        options |= {"head_dim": 128}  # transformers reads no other from GGUF
    elif kind == "gpt2":
        options |= {"n_positions": 1024}  # nor this
    loaded = random_model(kind, small_tokenizer, **options)
    write_gguf(loaded, tmp_path / "model.gguf", "f32", [small_tokenizer.eos_token_id])
    read = load_model(str(tmp_path / "model.gguf"), "float32", torch.device("cpu"))
    weights = read.model.state_dict()
    assert set(weights) == set(loaded.model.state_dict())
    for name, weight in loaded.model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, atol=2e-7, rtol=0, msg=name)
    assert small_tokenizer.get_vocab().items() <= read.tokenizer.get_vocab().items()  # transformers adds its own
    assert read.tokenizer.chat_template == small_tokenizer.chat_template
    assert (read.tokenizer.bos_token, read.tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    text = "the ferryman said 1984 times 江雪"
    assert read.tokenizer(text)["input_ids"] == small_tokenizer(text)["input_ids"]


def byte_level(pre_tokenizer: Any, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|begin|>", "<|stop|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS, *sentences(50)] * 2, trainer)
    tokenizer.add_tokens(["[note]"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|stop|>")


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def sentencepiece(space: str) -> PreTrainedTokenizerFast:
    """BPE as it comes from SentencePiece: every pair of tokens that makes a token is a merge, in the tokens' order."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trained.train_from_iterator(sentences(50), trainers.BpeTrainer(vocab_size=250, show_progress=False))
    pieces = [token for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {
        token: at for at, token in enumerate([*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces])
    }
    known = set(pieces)
    merges = [
        (piece[:at], piece[at:])
        for piece in pieces
        for at in range(1, len(piece))
        if piece[:at] in known and piece[at:] in known
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if space in ("always", "first"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space, split=False)
    else:
        prepend = [normalizers.Prepend("▁")] if space == "prepended" else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken("[note]", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_bos_token=True
    )


QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TOKENIZERS = {
    "gpt-2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": lambda: byte_level(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "qwen2": lambda: byte_level(split(QWEN_2)),
    "llama-bpe": lambda: byte_level(split(QWEN_2.replace(r"\p{N}|", r"\p{N}{1,3}|")), ignore_merges=True),
    "sentencepiece": lambda: sentencepiece("prepended"),
    "sentencepiece without space": lambda: sentencepiece("none"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_sees_the_tokens_that_the_tokenizer_does(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    check_tokens(tokenizer, tmp_path / "model.gguf", ["<|begin|>a<|stop|> b</s>c", "a [note]b[note] c"])
    if not kind.startswith("sentencepiece"):
        assert str(GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents()) == kind


@pytest.mark.parametrize("before", ["", " "])
@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_chat_gets_no_spaces_that_the_tokenizer_does_not_put(scheme: str, before: str, tmp_path: Path) -> None:
    """Texts that begin with a space, or go on behind a special token, get one more from llama.cpp where it adds one."""
    tokenizer = sentencepiece(scheme)
    tokenizer.chat_template = "<s>{% for m in messages %}" + before + "{{ m['content'] + '</s>' }}{% endfor %}"
    write_gguf(random_model("llama", tokenizer), tmp_path / "model.gguf", "f32", [tokenizer.eos_token_id])
    llama_cpp = LlamaCpp(tmp_path / "model.gguf")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text} for text in ("the mill", "a boat")], tokenize=False
    )
    expected = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert llama_cpp.ask("/tokenize", content=prompt, parse_special=True)["tokens"] == expected


DIGITS = ["a  12", "  3   cats in   1984,    5", "x 1  2 \n  3\t4", "½  ² 7  ٣ 一  2", "v2.0.1  0x1F   -5"]


def test_llama_cpp_sees_the_tokens_that_smollm2_does(smollm2_shared: LoadedModel, tmp_path: Path) -> None:
    more = ["<|im_start|>user\n江雪<|im_end|>\n", *DIGITS]
    check_tokens(smollm2_shared.tokenizer, tmp_path / "model.gguf", more)
    assert str(GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents()) == "smollm"


def test_the_packaged_smollm2_is_tokenized_as_its_own_file_says(smollm2_shared: LoadedModel) -> None:
    """By llama.cpp, of the very file in the package."""
    llama_cpp = LlamaCpp(package_file(KNOWN_MODELS["smollm2-135m"].package))
    for text in [*TEXTS, *DIGITS, *sentences(5)]:
        assert llama_cpp.tokenize(text) == smollm2_shared.tokenizer(text)["input_ids"], text


def test_llama_cpp_sees_the_tokens_that_gpt2_does(gpt2_folder: Path, tmp_path: Path) -> None:
    loaded = load_model(str(gpt2_folder), "float32", torch.device("cpu"))
    check_tokens(loaded.tokenizer, tmp_path / "model.gguf", ["one<|endoftext|>two"])


def check_tokens(tokenizer: Any, file: Path, more: Sequence[str]) -> None:
    loaded = random_model("llama", tokenizer, num_hidden_layers=1, hidden_size=16, tie_word_embeddings=True)
    write_gguf(loaded, file, "f32", [tokenizer.eos_token_id])
    llama_cpp = LlamaCpp(file)
    for text in [*TEXTS, *more, *sentences(20)]:
        assert llama_cpp.tokenize(text) == tokenizer(text)["input_ids"], text


def test_the_chat_template_makes_the_same_prompt(small_tokenizer, tmp_path: Path) -> None:
    write_gguf(random_model("llama", small_tokenizer), tmp_path / "model.gguf", "f32", [small_tokenizer.eos_token_id])
    turns = [
        {"role": "user", "content": "the boat? 🙂"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
    ]
    expected = small_tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert LlamaCpp(tmp_path / "model.gguf").ask("/apply-template", messages=turns)["prompt"] == expected


def test_each_stop_token_ends_a_text(small_tokenizer, tmp_path: Path) -> None:
    loaded = random_model("llama", small_tokenizer)
    ids = small_tokenizer("the old ferryman")["input_ids"]
    written = transformers_greedy(loaded.model, ids, 12)
    first, second = list(dict.fromkeys(written))[2:4]
    for stops, at in (([first], first), ([second, first], first), ([second], second)):
        write_gguf(loaded, tmp_path / "model.gguf", "f32", [small_tokenizer.eos_token_id, *stops])
        answer = LlamaCpp(tmp_path / "model.gguf").greedy(ids, 12)
        assert answer["stop_type"] == "eos"
        assert [token for token in answer["tokens"] if token != at] == written[: written.index(at)]


FABLES = Path(finespun.__file__).parent / "data" / "fables" / "validation.jsonl"

PROMPTS = [
    f"{start} {subject}"
    for start in ("The capital of France is", "Write one sentence about", "A short story:", "Q: What is", "In 1969,")
    for subject in ("Paris", "rivers", "a boat", "music", "江雪", "12 + 30", "the moon", "bread", "an owl", "snow")
]


def equal_texts(llama_cpp: LlamaCpp, expected: Sequence[tuple[list[int], list[int]]]) -> int:
    """How many of the pairs of a prompt and what transformers writes after it llama.cpp writes as well, stop token
    included."""
    return sum(llama_cpp.greedy(ids, len(written))["tokens"] == written for ids, written in expected)


def test_smollm2_writes_the_same_in_llama_cpp(smollm2_shared: LoadedModel, tmp_path: Path) -> None:
    encoder = Encoder(smollm2_shared.tokenizer)
    write_gguf(smollm2_shared, tmp_path / "model.gguf", "f32", encoder.stop_ids)
    prompts = [encoder.encode_prompt(prompt) for prompt in PROMPTS[::17]]
    expected = [(ids, transformers_greedy(smollm2_shared.model, ids, 12)) for ids in prompts]
    assert equal_texts(LlamaCpp(tmp_path / "model.gguf"), expected) == 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_prompts_and_the_perplexity_of_each_quantization(smollm2_shared: LoadedModel, tmp_path: Path) -> None:
    encoder, file = Encoder(smollm2_shared.tokenizer), tmp_path / "model.gguf"
    prompts = [encoder.encode_prompt(prompt) for prompt in PROMPTS]
    expected = [(ids, transformers_greedy(smollm2_shared.model, ids, 32)) for ids in prompts]
    text = FABLES.read_text(encoding="utf-8").splitlines()
    texts = [smollm2_shared.tokenizer(json.loads(line)["fable"])["input_ids"][:80] for line in text[:12]]
    with torch.no_grad():
        logits = [smollm2_shared.model(torch.tensor([ids])).logits[0, :-1] for ids in texts]
    exact = [float(cross_entropy(each, torch.tensor(ids[1:]))) for each, ids in zip(logits, texts, strict=True)]
    found = {}
    for quantization in QUANTIZATIONS:
        write_gguf(smollm2_shared, file, quantization, encoder.stop_ids)
        llama_cpp = LlamaCpp(file, context=512)
        losses = [llama_cpp.loss(ids) for ids in texts]
        ratio = math.exp(sum(losses) / len(losses) - sum(exact) / len(exact))
        equal = equal_texts(llama_cpp, expected) if quantization in LEAST_EQUAL else 0
        found[quantization] = (equal, round(ratio, 4), file.stat().st_size)
    print(found)
    assert all(found[quantization][0] >= least for quantization, least in LEAST_EQUAL.items()), found
    assert all(1 / most < found[quantization][1] < most for quantization, most in MOST_PERPLEXITY.items()), found


LEAST_EQUAL = {"f32": 50, "f16": 44, "q8_0": 10}
"""Of 50 texts how many are the same."""

MOST_PERPLEXITY = {
    "f32": 1.001,
    "f16": 1.001,
    "bf16": 1.01,
    "q8_0": 1.02,
    "q6_k": 1.03,
    "q5_k_m": 1.25,  # more than q4_k_m: these weights lie on the grid of Q4_1, and between the steps of Q5_1
    "q4_k_m": 1.15,
}
"""By what the perplexity may be multiplied or divided."""


def read_tensors(file: Path) -> dict[str, tuple[str, torch.Tensor]]:
    return {
        tensor.name: (tensor.tensor_type.name, torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()))
        for tensor in GGUFReader(file).tensors
    }


ERRORS = {"f32": 0, "f16": 5e-4, "bf16": 4e-3, "q8_0": 6e-3, "q6_k": 0.02, "q5_k_m": 0.04, "q4_k_m": 0.08}
"""Root mean square of the error over that of the weights, of normally distributed ones."""


def test_each_quantization_rounds_as_much_as_its_bits_say(small_tokenizer, tmp_path: Path) -> None:
    loaded = random_model(
        "llama", small_tokenizer, hidden_size=256, intermediate_size=512, num_hidden_layers=8, tie_word_embeddings=True
    )
    prompt = small_tokenizer("the old ferryman")["input_ids"]
    with torch.no_grad():
        expected = loaded.model(torch.tensor([prompt])).logits[0, -1].log_softmax(0)
    exact: dict[str, tuple[str, torch.Tensor]] = {}
    sizes = []
    for quantization in QUANTIZATIONS:
        file = tmp_path / f"{quantization}.gguf"
        write_gguf(loaded, file, quantization, [small_tokenizer.eos_token_id])
        tensors = read_tensors(file)
        exact = exact or tensors
        assert tensors.keys() == exact.keys()
        for name, (kind, values) in tensors.items():
            error = (values - exact[name][1]).square().mean().sqrt() / exact[name][1].square().mean().sqrt()
            assert (error <= ERRORS[quantization]) if values.dim() > 1 else (kind == "F32" and not error), (name, error)
        sizes.append(file.stat().st_size)
        found = LlamaCpp(file).log_probabilities(prompt, len(small_tokenizer))
        assert (found - expected).abs().mean() < 1e-3 + 20 * ERRORS[quantization]
    assert sizes == sorted(sizes, reverse=True)
    kinds = {name: kind for name, (kind, _) in read_tensors(tmp_path / "q4_k_m.gguf").items()}
    assert kinds["token_embd.weight"] == "Q6_K"
    assert [kinds[f"blk.{layer}.attn_v.weight"] for layer in range(8)] == [
        "Q6_K",
        *["Q4_K"] * 2,
        "Q6_K",
        *["Q4_K"] * 2,
        *["Q6_K"] * 2,
    ]
    assert {kinds[f"blk.{layer}.attn_q.weight"] for layer in range(8)} == {"Q4_K"}


def test_rows_that_are_no_multiple_of_a_block_get_the_next_wider_format(small_tokenizer, tmp_path: Path) -> None:
    loaded = random_model(
        "llama", small_tokenizer, hidden_size=96, intermediate_size=80, num_attention_heads=3, num_key_value_heads=3
    )
    write_gguf(loaded, tmp_path / "model.gguf", "q4_k_m", [small_tokenizer.eos_token_id])
    kinds = {name: kind for name, (kind, _) in read_tensors(tmp_path / "model.gguf").items()}
    assert (kinds["blk.0.attn_q.weight"], kinds["output.weight"], kinds["blk.0.ffn_down.weight"]) == (
        "Q5_0",
        "Q8_0",
        "F16",
    )
    LlamaCpp(tmp_path / "model.gguf").greedy([5], 1)


def test_a_sliding_window_that_llama_cpp_lacks_bounds_the_context(small_tokenizer, tmp_path: Path) -> None:
    for kind, window, expected in (("mistral", 48, 48), ("mistral", None, 256), ("gemma2", 24, 256)):
        options = {**GEMMA} if kind == "gemma2" else {}
        loaded = random_model(kind, small_tokenizer, **options | {"sliding_window": window})
        write_gguf(loaded, tmp_path / "model.gguf", "f32", [small_tokenizer.eos_token_id])
        reader = GGUFReader(tmp_path / "model.gguf")
        name = reader.fields["general.architecture"].contents()
        assert reader.fields[f"{name}.context_length"].contents() == expected


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation": ("llama", {"hidden_act": "gelu"}, "activation gelu"),
    "dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope"),
    "GPT-2's scale": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
    "Gemma's scale": ("gemma2", {**GEMMA, "query_pre_attn_scalar": 32}, "query_pre_attn_scalar"),
    "Gemma's layers": ("gemma3_text", {**GEMMA, "layer_types": ["full_attention"] * 2}, "layers"),
    "Gemma's caps": ("gemma2", {**GEMMA, "attn_logit_softcapping": None}, "soft caps"),
    "Gemma's head": ("gemma2", {**GEMMA, "tie_word_embeddings": False}, "a head"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(case: str, small_tokenizer, tmp_path: Path) -> None:
    kind, options, message = REFUSED[case]
    with pytest.raises(ModelError, match=message):
        write_gguf(random_model(kind, small_tokenizer, **options), tmp_path / "model.gguf", "f32", [0])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_architecture_is_named_with_those_that_are_known(small_tokenizer, tmp_path: Path) -> None:
    config = OPTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=32)
    loaded = LoadedModel(OPTForCausalLM(config), small_tokenizer, "opt", Path())
    with pytest.raises(
        ModelError, match=r"architecture opt .*llama, mistral, gpt2, qwen2, qwen3, gemma2, gemma3_text, phi3"
    ):
        write_gguf(loaded, tmp_path / "model.gguf", "f32", [0])


def test_an_adapter_is_not_left_out_silently(tiny: LoadedModel, tmp_path: Path) -> None:
    tiny.model = add_lora(tiny.model, LoraRecipe())
    with pytest.raises(ModelError, match="merge the adapter"):
        write_gguf(tiny, tmp_path / "model.gguf", "f32", [0])


def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tmp_path: Path) -> None:
    lower = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    unigram = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)), eos_token="<unk>"
    )
    unclosed = sentencepiece("prepended")
    description = json.loads(unclosed.backend_tokenizer.to_str())
    del description["model"]["merges"][-1]
    lacking = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)), eos_token="</s>")
    normalized = sentencepiece("prepended")
    normalized.add_tokens(["[more]"])
    for tokenizer, message in (
        (byte_level(split(r"\w+|\W+")), "no name in llama.cpp"),
        (byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "no name in llama.cpp"),
        (lower, "Lowercase"),
        (unigram, "Unigram"),
        (lacking, "does not merge"),
        (normalized, "normalized"),
    ):
        loaded = random_model("llama", tokenizer, num_hidden_layers=1)
        (tmp_path / "model.gguf").write_text("the file that was there")
        with pytest.raises(ModelError, match=message):
            write_gguf(loaded, tmp_path / "model.gguf", "f32", [tokenizer.eos_token_id])
        assert [path.read_text() for path in tmp_path.iterdir()] == ["the file that was there"]


def test_too_many_stop_tokens_too_few_embeddings_and_too_large_weights(small_tokenizer, tmp_path: Path) -> None:
    loaded = random_model("llama", small_tokenizer)
    with pytest.raises(ModelError, match="three tokens that end a text"):
        write_gguf(loaded, tmp_path / "model.gguf", "f32", [small_tokenizer.eos_token_id, 5, 6, 7])
    with torch.no_grad():
        loaded.model.lm_head.weight[0, 0] = 70000.0
    with pytest.raises(ModelError, match="bf16"):
        write_gguf(loaded, tmp_path / "model.gguf", "f16", [small_tokenizer.eos_token_id])
    small = random_model("llama", small_tokenizer, vocab_size=300)
    with pytest.raises(ModelError, match="embeddings for 300"):
        write_gguf(small, tmp_path / "model.gguf", "f32", [small_tokenizer.eos_token_id])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunError, match="could not be written"):
        write_gguf(loaded, tmp_path / "none" / "model.gguf", "f32", [small_tokenizer.eos_token_id])


def test_k_quants_without_llama_cpp_say_what_to_install(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finespun.export import gguf_quantization

    monkeypatch.setitem(__import__("sys").modules, "xllamacpp", None)
    gguf_quantization._llama_cpp_quantizer.cache_clear()
    with pytest.raises(ModelError, match=r"finespun\[llama-cpp\]"):
        write_gguf(tiny, tmp_path / "model.gguf", "q4_k_m", [0])
