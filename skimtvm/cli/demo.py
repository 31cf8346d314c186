"""``skimtvm demo``: build a network, compile it, check it, time it, all in one command."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InternalError
from ._common import plural, repeat_option, threads_option
from .compile import progress
from .profile import print_profile

if TYPE_CHECKING:
    import numpy as np

SETTLE = 0.03  # seconds; TVM's idle threads spin for about 10 ms
TOLERANCE = 1e-3  # of the largest output: float32 sums of thousands of terms in another order


class Sparsity(click.ParamType):
    """``seed`` (measured per layer on a published network), ``none``, or the fraction of zeros."""

    name = "seed|none|0.9"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in ("seed", "none"):
            return value
        try:
            fraction = float(value)
        except (TypeError, ValueError):
            fraction = -1.0
        if not 0 <= fraction < 1:
            self.fail(f"'{value}' is neither seed nor none nor a fraction of zeros (0 <= fraction < 1)", param, ctx)
        return fraction


@click.command("demo", short_help="Compile, verify and time a built-in network.")
@click.option("--network", default="resnet50", show_default=True, help="Network of the built-in zoo, e.g. bert.")
@click.option(
    "--sparsity",
    type=Sparsity(),
    help="Fraction of zeros in the weights.  [default: seed; 0.9 for a network without published ones]",
)
@click.option("--output", type=click.Path(path_type=Path), help="Keep the compiled module here (.so).")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@repeat_option
@threads_option
def demo_command(
    network: str, sparsity: Any, output: Path | None, overwrite: bool, repeat: int, threads: int | None
) -> None:
    """Compile a built-in network with pruned random weights, verify its result and profile it."""
    from .. import artifact
    from ..runtime import load
    from ..tvm_runtime import check_threads, import_compiler

    import_compiler()
    from .. import zoo
    from ..compiler import CompileOptions, compile_model
    from ..profiler import measure, profile, random_feeds

    zoo.check_name(network)
    if sparsity is None:
        sparsity = "seed" if zoo.has_table(network) else 0.9
    count = check_threads(threads)
    if output is not None:
        artifact.check_output(output, overwrite=overwrite)
    model = zoo.build(network, sparsity=None if sparsity == "none" else sparsity)
    work = Path(tempfile.mkdtemp(prefix="skimtvm-"))
    try:
        with progress(False) as report:
            compiled = compile_model(model, CompileOptions(), progress=report)
            module = load(artifact.write(compiled, output or work / "demo.so", overwrite=overwrite), threads=count)
            feeds = random_feeds(module.inputs)
            name, reference = _reference(model, module.manifest, work, count)
            expected = reference(feeds)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    error = _difference(module.run(feeds), expected)
    print_profile(profile(module, feeds, repeat=repeat, threads=count), why=True)
    click.echo(f"verified against {name}: largest difference {error:.1e} of the largest output")
    times = measure(
        {"skimtvm": lambda: module.run(feeds), name: lambda: reference(feeds)}, repeat=repeat, settle=SETTLE
    )
    ratio = times[name].median / times["skimtvm"].median
    click.echo(
        f"skimtvm {times['skimtvm']}, {name} {times[name]}, on {plural(count, 'thread')}: {ratio:.2f} times as fast"
    )
    if output is not None:
        click.echo(f"module kept in {output}")


def _reference(
    model: Any, manifest: Any, work: Path, threads: int
) -> tuple[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]]:
    """Name and function of something independent to compare with: ONNX Runtime, or else our own dense kernels."""
    names = [spec.name for spec in manifest.outputs]
    try:
        import onnxruntime
    except ImportError:
        from .. import artifact
        from ..compiler import CompileOptions, compile_model
        from ..runtime import load

        dense = compile_model(model, CompileOptions(sparse_threshold=0.0))
        module = load(artifact.write(dense, work / "dense.so"), threads=threads)
        return "its own dense kernels", module.run
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads let go when a run ends
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return (
        f"ONNX Runtime {onnxruntime.__version__}",
        lambda feeds: dict(zip(names, session.run(names, feeds), strict=True)),
    )


def _difference(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Largest difference relative to the largest expected value. Raises InternalError beyond TOLERANCE."""
    import numpy as np

    worst = 0.0
    for name, want in expected.items():
        scale = max(float(np.abs(want).max(initial=0)), 1e-30)
        error = float(np.abs(got[name].astype(np.float64) - want).max(initial=0)) / scale
        if not error <= TOLERANCE:  # also for NaN
            raise InternalError(f"output '{name}' differs from the reference by {error:.1e} of its largest value")
        worst = max(worst, error)
    return worst
