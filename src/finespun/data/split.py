"""What is held out for validation: by the content of an example, so that order and additions do not move it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from finespun.data.formats import Example, MessagesExample, PromptExample, TextExample
from finespun.errors import DataError


def content_hash(example: Example) -> bytes:
    """SHA-256 of what an example says, wherever it stands."""
    match example:
        case TextExample(text):
            parts = [text]
        case PromptExample(prompt, completion):
            parts = [prompt, completion]
        case MessagesExample(messages):
            parts = [part for message in messages for part in (message["role"], message["content"])]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\x00")
    return digest.digest()


def hold_out(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """`(train, validation)` with about `share` of the examples held out, each in its given order.

    An example is held out when its hash falls into the lowest `share` of all hashes: duplicates stay on one side, and
    appended rows leave the others where they were. With a share above 0, both sides get at least one example.
    Raises `DataError` where that cannot be.
    """
    if share == 0:
        return list(examples), []
    hashes = [content_hash(example) for example in examples]
    distinct = sorted(set(hashes))
    if len(distinct) < 2:
        raise DataError(
            "One distinct example cannot be split into training and validation. "
            "Add more, check data.documents, or train without validation (data.validation 0)."
        )
    limit = int(share * 2**64).to_bytes(9, "big")[1:]
    held = {value for value in distinct if value[:8] < limit} or {distinct[0]}
    if len(held) == len(distinct):
        held.remove(distinct[-1])
    train = [example for example, value in zip(examples, hashes, strict=True) if value not in held]
    validation = [example for example, value in zip(examples, hashes, strict=True) if value in held]
    return train, validation
