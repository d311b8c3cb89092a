"""What a person can say about a server. Light to import: the command line shows it in its help."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finespun.export.settings import Quantization
from finespun.recipe import Section


class ServerSettings(Section):
    """Where a server listens and what it takes on."""

    host: str = "127.0.0.1"
    """Address to listen at. Any other than this machine's own needs an API key."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen at; 0 takes a free one."""
    cors_origin: list[str] = Field(default_factory=list)
    """Origins whose web pages may call the server (https://example.org); none by default."""
    precision: Literal["float32", "bfloat16"] | None = None
    """What models compute in; by default what `finespun generate` computes them in here. In bfloat16 two tokens may be
    as good as each other, and which one is taken can, on a GPU, depend on what else is being written."""
    engine: Literal["finespun", "llama.cpp", "vllm"] = "finespun"
    """What writes: finespun's own engine; llama.cpp (pip install 'finespun[llama-cpp]'), which is faster for few
    clients on a CPU; or vLLM (pip install vllm), for many clients on a GPU. Both know fewer settings."""
    quantization: Quantization = "q8_0"
    """How llama.cpp has the weights; f16 and f32 are nearer to what was trained, the others are faster."""
    vllm_options: str = ""
    """Further arguments of `vllm serve`: --vllm-options="--tensor-parallel-size 2". Each model has a vLLM of its own,
    which takes most of a GPU's memory unless --gpu-memory-utilization says otherwise."""
    slots: Annotated[int, Field(ge=1)] = 64
    """Texts that are written at once, for each model."""
    max_queue: Annotated[int, Field(ge=0)] = 256
    """Texts that may wait for a slot, for each model; what comes beyond them is told to come again (429)."""
    max_body_mb: Annotated[float, Field(gt=0)] = 4.0
    """Largest body of a request in megabytes (413)."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest prompt in tokens (400); by default what the model's context holds."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 2048
    """Longest text that a request may ask for (400), and the length where it asks for none."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Longest time for one request; one that is not answered by then gets 503, a stream ends with an error."""
    grace_seconds: Annotated[float, Field(ge=0)] = 30.0
    """On SIGTERM or Ctrl-C, how long texts that are being written may take to end."""
    log_prompts: bool = False
    """Write prompts and texts to the log as well."""
