"""How the time grows: over sparsity, batch and image size, with the automatic choice of kernels against all layers dense
and all pruned layers sparse."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import zoo
from ..compiler import CompileOptions
from ..errors import InvalidOption
from ..report import LayerRecord
from ..runtime import Module
from .engines import SkimTVM, difference, feeds_for
from .networks import Say, Work, compile_to
from .records import EngineTime, SweepRow, Terms
from .sparsity import Sparsity
from .timing import Rounds, interleave

VALUES: dict[str, tuple[float, ...]] = {
    "sparsity": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "size": (112, 160, 224, 288, 352, 448),
}
AUTO, DENSE, SPARSE = "auto", "all dense", "all sparse"
CHOICES = {
    AUTO: CompileOptions(),
    DENSE: CompileOptions(sparse_threshold=0.0),
    SPARSE: CompileOptions(sparse_threshold=1.0),
}


@dataclass(frozen=True)
class Point:
    """One setting of a sweep; ``size``: height and width of the image, 0 for the network's own input."""

    sweep: str
    value: float
    network: str
    sparsity: Sparsity
    batch: int
    size: int = 0


def points(sweep: str, network: str, sparsity: Sparsity, batch: int, values: tuple[float, ...] = ()) -> list[Point]:
    """The settings of ``sweep``; everything but the swept quantity stays as given. Raises InvalidOption."""
    if sweep not in VALUES:
        raise InvalidOption(f"sweep '{sweep}' is unknown; choose one of {', '.join(VALUES)}")
    if sweep == "size" and network in zoo.TRANSFORMERS:
        raise InvalidOption(f"--sweep size: network '{network}' takes no images; choose resnet50 or googlenet")
    result = []
    for value in values or VALUES[sweep]:
        if sweep == "sparsity":
            kind = "block" if sparsity.kind == "block" else "uniform"
            if not 0 <= value < 1:
                raise InvalidOption(f"--values {value:g}: a sparsity is a share of zeros, from 0 to below 1")
            result.append(Point(sweep, value, network, Sparsity(kind, value, sparsity.rows), batch))
        elif value < 1 or value != int(value):
            raise InvalidOption(f"--values {value:g}: a {sweep} is a whole number from 1")
        elif sweep == "batch":
            result.append(Point(sweep, value, network, sparsity, int(value)))
        else:
            result.append(Point(sweep, value, network, sparsity, batch, int(value)))
    return result


def measure_point(
    point: Point, threads: int, *, rounds: Rounds, terms: Terms, say: Say = lambda text: None
) -> SweepRow:
    """The three choices in turns on one model and input."""
    model = point.sparsity.build(point.network, batch=point.batch)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    size = dims[1 if point.network in zoo.TRANSFORMERS else 2].dim_value
    if point.size:
        resize_input(model, point.size)
        size = point.size
    with tempfile.TemporaryDirectory(prefix="skimtvm-bench-") as folder:
        modules = {}
        for name, options in CHOICES.items():
            say(f"compile {name}")
            modules[name] = compile_to(Path(folder) / f"{name.replace(' ', '-')}.so", model, options)
    feeds = feeds_for(modules[AUTO])
    # Choices that come to the same kernels are one module: two measurements of it would differ by luck alone.
    same = {
        name: next(n for n, m in modules.items() if kernels(m) == kernels(module)) for name, module in modules.items()
    }
    runners = {name: SkimTVM(modules[name], feeds, threads) for name in dict.fromkeys(same.values())}
    outputs = {name: runner.outputs() for name, runner in runners.items()}
    say("measure")
    times = interleave(runners, rounds, threads=threads)
    work = Work.of(modules[AUTO].manifest.layers)
    engines: list[EngineTime] = [
        work.time(name, runners[one].version, times[one], error=difference(outputs[AUTO], outputs[one]))
        for name, one in same.items()
    ]
    return SweepRow(
        terms=terms,
        sweep=point.sweep,
        value=point.value,
        network=point.network,
        sparsity=str(point.sparsity),
        source=point.sparsity.source,
        batch=point.batch,
        size=size,
        threads=threads,
        engines=tuple(engines),
    )


def kernels(module: Module) -> list[LayerRecord]:
    """What runs in ``module``, without the reasons for it."""
    return [replace(layer, reason="") for layer in module.manifest.layers]


def resize_input(model: Any, size: int) -> None:
    """Give the image of ``model`` ``size`` rows and columns, in place. The average over the last plane becomes a global
    one, so that the layers behind it keep their shapes. Raises InvalidOption for a network without one."""
    graph = model.graph
    for dim in graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = size
    del graph.value_info[:]
    if any(n.op_type == "GlobalAveragePool" for n in graph.node):
        return
    pools = [n for n in graph.node if n.op_type == "AveragePool"]
    gemm = next((i for i, n in enumerate(graph.node) if n.op_type == "Gemm"), len(graph.node))
    if not pools or any(n.op_type == "Conv" for n in list(graph.node)[list(graph.node).index(pools[-1]) : gemm]):
        raise InvalidOption(f"--sweep size: network '{graph.name}' has no global pooling; choose resnet50 or googlenet")
    pools[-1].op_type = "GlobalAveragePool"
    del pools[-1].attribute[:]
