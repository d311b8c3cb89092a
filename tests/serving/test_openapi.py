"""The OpenAPI description, by which schemathesis makes up requests of all kinds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from servers import running

schemathesis = pytest.importorskip("schemathesis")


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_no_request_that_the_description_allows_or_forbids_is_a_server_error(tiny_folder: Path, mode: Any) -> None:
    """And what comes back is as described: its status, its kind, its fields."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    seen: Counter[tuple[str, int]] = Counter()
    with running(sources={"m": str(tiny_folder)}, max_new_tokens=1000) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        for operation in (found.ok() for found in schema.get_all_operations()):
            if mode is schemathesis.GenerationMode.NEGATIVE and not operation.body:
                continue  # nothing could be wrong

            @settings(max_examples=100, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
            @given(case=operation.as_strategy(generation_mode=mode))
            def attempt(case: Any) -> None:
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = "m"
                answer = case.call(timeout=120)
                seen[case.operation.path, answer.status_code] += 1
                case.validate_response(answer, checks=checks)

            attempt()
        assert server.post(json={"model": "m", "prompt": "a"}).status_code == 200
    assert {path for path, _ in seen} >= {"/v1/completions", "/v1/chat/completions"}
