"""What the tests put in vLLM's place: its command line and its `/v1/completions`, as vLLM 0.33 has them, over a list of
token ids instead of a model. An argument or a field that vLLM does not have is an error here as well.

`plan.json` beside the program says what happens; what it was asked is written to `asked.jsonl` there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

PLACE = Path(__file__).resolve().parent
PLAN: dict[str, Any] = json.loads((PLACE / "plan.json").read_text(encoding="utf-8"))


def write(what: dict[str, Any]) -> None:
    with (PLACE / "asked.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(what) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("vllm", allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model_tag")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--lora-modules", nargs="+", type=json.loads)
    parser.add_argument("--max-lora-rank", type=int, choices=[1, 8, 16, 32, 64, 128, 256, 320, 512])
    parser.add_argument("--tokenizer")
    parser.add_argument("--generation-config", default="auto")
    parser.add_argument("--override-generation-config", type=json.loads)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--dtype", choices=["auto", "half", "float16", "bfloat16", "float", "float32"])
    parser.add_argument("--chat-template")
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--structured-outputs-config", type=json.loads)
    parser.add_argument("--disable-uvicorn-access-log", action="store_true")
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--uds", required=True)
    return parser.parse_args()


class StructuredOutputs(BaseModel):
    model_config = ConfigDict(extra="forbid")
    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    prompt: list[int]
    stream: Literal[True]
    return_token_ids: Literal[True]
    max_tokens: int = Field(ge=1)
    min_tokens: int = Field(ge=0)
    temperature: float = Field(ge=0, le=2)
    top_k: int = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    min_p: float = Field(ge=0, le=1)
    repetition_penalty: float = Field(gt=0)
    presence_penalty: float = Field(ge=-2, le=2)
    frequency_penalty: float = Field(ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    stop: list[str]
    stop_token_ids: list[int]
    ignore_eos: bool
    seed: int
    logprobs: int | None = Field(None, ge=0, le=20)
    return_tokens_as_token_ids: bool = False
    structured_outputs: StructuredOutputs | None = None


app = FastAPI()


@app.get("/health")
def health() -> Response:
    return Response()


@app.exception_handler(RequestValidationError)
def refuse(request: Request, error: Any) -> JSONResponse:
    return error_response(str(error), 400)


def error_response(message: str, code: int) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "BadRequestError", "param": None, "code": code}}, code)


@app.post("/v1/completions")
def completions(asked: Asked, request: Request) -> Any:
    write({"body": asked.model_dump(by_alias=True, exclude_none=True)})
    if asked.model != PLAN["model"]:
        return error_response(f"The model `{asked.model}` does not exist.", 404)
    if refusal := PLAN.get("refuses"):
        return error_response(refusal, 400)
    return StreamingResponse(stream(asked, request), media_type="text/event-stream")


async def stream(asked: Asked, request: Request) -> Any:
    if error := PLAN.get("error"):
        yield event({"error": {"message": error[0], "type": "BadRequestError", "param": None, "code": error[1]}})
        yield "data: [DONE]\n\n"
        return
    yield ": keep-alive\n\n"
    written = 0
    try:
        for token in PLAN["ids"]:
            written += 1
            reason = "stop" if token in asked.stop_token_ids else "length" if written == asked.max_tokens else None
            if written == len(PLAN["ids"]):
                reason = reason or PLAN.get("reason", "stop")
            yield event({"choices": [choice(asked, token, reason)]})
            if written == PLAN.get("crashes_after"):
                os._exit(3)
            if reason:
                break
            await asyncio.sleep(PLAN.get("seconds", 0))
        yield "data: [DONE]\n\n"
    except asyncio.CancelledError:
        write({"left_after": written})
        raise


def choice(asked: Asked, token: int, reason: str | None) -> dict[str, Any]:
    found = {
        "index": 0,
        "text": "\ufffd",  # as of a token that is no whole character; what counts are the ids
        "finish_reason": reason,
        "stop_reason": token if token in asked.stop_token_ids else None,
        "token_ids": [token],
    }
    if asked.logprobs is None:
        return found
    others = {f"token_id:{other}": -0.5 - rank for rank, other in enumerate(range(10, 10 + asked.logprobs))}
    found["logprobs"] = {
        "text_offset": [0],
        "tokens": [f"token_id:{token}"],
        "token_logprobs": [-2.0],
        "top_logprobs": [{f"token_id:{token}": -2.0} | others],
    }
    return found


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def main() -> None:
    given = arguments()
    write({"arguments": sys.argv[1:], "environment": os.environ.get("VLLM_NO_USAGE_STATS")})
    print("INFO loading", flush=True)
    time.sleep(PLAN.get("slow", 0))
    if "dies" in PLAN:
        print(PLAN["dies"], file=sys.stderr, flush=True)
        sys.exit(1)
    uvicorn.run(app, uds=given.uds, log_level="warning")


main()
