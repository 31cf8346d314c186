"""``skimtvm serve``: a compiled module behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import EnvironmentProblem
from ._common import Threads


@click.command("serve", short_help="Serve a compiled module over HTTP (Open Inference Protocol).")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free port.")
@click.option("--name", help="Name of the model in URLs.  [default: the file's]")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 1024), help="Worker processes.")
@click.option("--threads", type=Threads(), help="Threads of each worker.  [default: the CPUs divided by the workers]")
@click.option(
    "--queue",
    default=64,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="Requests that may wait; others get 503.",
)
@click.option(
    "--timeout",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0, 3600, min_open=True),
    help="Seconds for a request; then it gets 504.",
)
@click.option(
    "--max-request-bytes",
    type=click.IntRange(1, 1 << 31),
    help="Size of a request; beyond that it gets 413.  [default: room for the largest batch as JSON]",
)
@click.option(
    "--max-batch-delay",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0, 60000),
    help="Milliseconds that a request may wait for others to share its batch.",
)
@click.option(
    "--engine",
    default="skimtvm",
    show_default=True,
    type=click.Choice(["skimtvm", "onnxruntime"]),
    help="onnxruntime serves an .onnx file of fixed shapes, to compare with.",
)
@click.option(
    "--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning", "error"])
)
@click.option("--access-log/--no-access-log", default=True, show_default=True, help="Log each request.")
def serve_command(model: Path, max_batch_delay: float, **options: Any) -> None:
    """Serve MODEL (.so) until SIGTERM or Ctrl-C. Logs are JSON lines on stderr. Needs: pip install 'skimtvm[serve]'."""
    try:
        from ..serve.server import Settings, run
    except ImportError as e:
        raise EnvironmentProblem(f"cannot import {e.name}, which serving needs; pip install 'skimtvm[serve]'") from None
    run(Settings(path=model, max_batch_delay=max_batch_delay / 1e3, **options))
