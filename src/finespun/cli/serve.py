"""`finespun serve`."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Annotated

from cyclopts import Parameter

from finespun.errors import FinespunError
from finespun.serving.settings import ServerSettings


def serve(
    models: list[str],
    /,
    *,
    api_key: Annotated[str | None, Parameter(env_var="FINESPUN_API_KEY")] = None,
    settings: Annotated[ServerSettings | None, Parameter(name="*")] = None,
) -> None:
    """Serve models to programs that speak OpenAI's API, until Ctrl-C or SIGTERM.

    For example: finespun serve runs/stories runs/poems --port 8000

    Parameters
    ----------
    models
        Run folders, model or adapter folders, .gguf files, known names or hub ids; NAME=MODEL serves one as NAME.
    api_key
        What clients have to send; better given in the environment, where other users do not see it.
    """
    if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]:
        raise FinespunError(f"Serving needs the package {missing[0]}: pip install 'finespun[serve]'")
    from finespun.serving.server import serve as run

    run(models, settings or ServerSettings(), api_key, functools.partial(print, flush=True))
