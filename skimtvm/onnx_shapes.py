"""Give every graph input of an ONNX model a static shape, and change a batch that is fixed in the graph.

Nothing here needs TVM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx.shape_inference
from onnx import numpy_helper

from .errors import InvalidOption, UnboundShape, UnsupportedModel
from .onnx_fold import fold
from .onnx_infer import TypeShape, infer
from .onnx_read import one_line, skeleton

Dim = int | str | None  # a value, a symbol, or nothing known


def declared_dims(value: Any) -> tuple[Dim, ...] | None:
    """Dimensions of a graph input as the file declares them; None where not even the rank is known."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    dims: list[Dim] = []
    for dim in tensor.shape.dim:
        if dim.HasField("dim_value") and dim.dim_value >= 0:  # some exporters write -1 for "unknown"
            dims.append(dim.dim_value)
        else:
            dims.append(dim.dim_param or None)
    return tuple(dims)


def _show(dims: Sequence[Dim] | None) -> str:
    return "unknown rank" if dims is None else "(" + ",".join("?" if d is None else str(d) for d in dims) + ")"


def _listing(inputs: Mapping[str, Sequence[Dim] | None]) -> str:
    return ", ".join(f"'{name}' {_show(dims)}" for name, dims in inputs.items()) or "none"


def _dimension(name: str, k: int, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidOption(f"input shape of '{name}': dimension {k} is {value!r}; give a whole number of at least 1")
    if int(value) < 1:
        raise InvalidOption(
            f"input shape of '{name}': dimension {k} is {int(value)}; every dimension must be at least 1"
        )
    return int(value)


class _Binding:
    """Collects what the user and the model say about each input, and the value of each symbol."""

    def __init__(self, inputs: dict[str, tuple[Dim, ...] | None]):
        self.declared = inputs
        self.shapes: dict[str, list[Dim] | None] = {n: None if d is None else list(d) for n, d in inputs.items()}
        self.symbols: dict[str, int] = {}

    def set(self, name: str, k: int, value: int, origin: str) -> None:
        dims, declared = self.shapes[name], self.declared[name]
        assert dims is not None
        dims[k] = value
        symbol = declared[k] if declared is not None else None
        if isinstance(symbol, str) and self.symbols.setdefault(symbol, value) != value:
            raise InvalidOption(
                f"{origin}: dimension {k} of input '{name}' is {symbol}={value}, but another input binds {symbol}="
                f"{self.symbols[symbol]}; give the same value for both"
            )

    def explicit(self, shapes: Mapping[str, Sequence[int]]) -> None:
        for name, shape in shapes.items():
            if name not in self.declared:
                raise InvalidOption(
                    f"input shape given for '{name}', but the inputs of the model are {_listing(self.declared)}"
                )
            if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence):
                raise InvalidOption(f"input shape of '{name}' is {shape!r}; give one whole number a dimension")
            values = [_dimension(name, k, v) for k, v in enumerate(shape)]
            declared = self.declared[name]
            if declared is None:
                self.shapes[name] = [None] * len(values)
            elif len(declared) != len(values):
                raise InvalidOption(
                    f"input shape of '{name}' has {len(values)} dimensions, but the model declares {len(declared)}: "
                    f"{_show(declared)}; give one number for each"
                )
            for k, value in enumerate(values):
                self.set(name, k, value, f"input shape of '{name}'")

    def batch(self, batch: int, given: Mapping[str, Sequence[int]]) -> None:
        if isinstance(batch, bool) or not hasattr(batch, "__index__") or int(batch) < 1:
            raise InvalidOption(f"batch is {batch!r}; give a whole number of at least 1")
        for name, dims in self.shapes.items():
            if not dims:
                continue
            if name in given and dims[0] != int(batch):
                raise InvalidOption(
                    f"batch is {int(batch)}, but the input shape of '{name}' begins with {dims[0]}; give the same value"
                )
            self.set(name, 0, int(batch), "batch")

    def finish(self) -> dict[str, tuple[int, ...]]:
        problems, remedies, only_batch = [], [], True
        result = {}
        for name, dims in self.shapes.items():
            if dims is None:
                problems.append(f"input '{name}' has no shape")
                remedies.append(f"--input-shape {name}=<d0>,<d1>,...")
                only_batch = False
                continue
            full = [self.symbols.get(d, d) if isinstance(d, str) else d for d in dims]
            open_dims = [k for k, d in enumerate(full) if not isinstance(d, int)]
            if open_dims:
                listed = ", ".join(f"{k}" + (f" ({full[k]})" if full[k] else "") for k in open_dims)
                problems.append(f"input '{name}' {_show(full)}: dimension {listed} has no value")
                guess = [
                    str(d) if isinstance(d, int) else "1" if k == 0 else f"<{d or f'd{k}'}>" for k, d in enumerate(full)
                ]
                remedies.append(f"--input-shape {name}={','.join(guess)}")
                only_batch &= open_dims == [0]
            elif 0 in full:
                raise UnsupportedModel(
                    f"input '{name}' {_show(full)}: dimension {full.index(0)} has size zero; "
                    f"give its size with --input-shape {name}=<sizes>"
                )
            else:
                result[name] = tuple(d for d in full if isinstance(d, int))
        if problems:
            batch = "--batch 1 or " if only_batch else ""
            raise UnboundShape(f"{'; '.join(problems)}: bind with {batch}{' '.join(remedies)}")
        return result


def resolve_inputs(
    model: Any, input_shapes: Mapping[str, Sequence[int]] | None, batch: int | None
) -> tuple[dict[str, tuple[int, ...]], tuple[int, int] | None]:
    """Static shape of every graph input, and (old, new) batch where a batch that is fixed in the graph must change.

    Raises InvalidOption for shapes that do not fit the inputs and UnboundShape for dimensions that stay without value.
    """
    inputs: dict[str, tuple[Dim, ...] | None] = {}
    for value in model.graph.input:
        if not value.type.HasField("tensor_type"):
            kind = value.type.WhichOneof("value") or "no type"
            raise UnsupportedModel(
                f"input '{value.name}' is not a tensor ({kind.replace('_type', '')}); export it with tensor inputs"
            )
        inputs[value.name] = declared_dims(value)
    given = input_shapes or {}
    binding = _Binding(inputs)
    binding.explicit(given)
    if batch is not None:
        binding.batch(batch, given)
    shapes = binding.finish()
    changes = set()
    for name, dims in inputs.items():
        if dims and isinstance(dims[0], int) and dims[0] > 0 and dims[0] != shapes[name][0]:
            changes.add((dims[0], shapes[name][0]))
    if len(changes) > 1:
        raise UnsupportedModel(
            f"inputs {_listing(inputs)}: their first dimensions differ, so it is not clear which is the batch; "
            "export the model with a dynamic batch"
        )
    return shapes, next(iter(changes), None)


def set_input_shapes(model: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Write the shapes into graph.input and forget every other shape, which may contradict them now."""
    for value in model.graph.input:
        shape = value.type.tensor_type.shape
        shape.Clear()
        value.type.tensor_type.shape.SetInParent()
        for d in shapes[value.name]:
            shape.dim.add().dim_value = d
    forget_shapes(model)


def forget_shapes(model: Any) -> None:
    """Drop declared shapes of intermediate values and outputs: exporters often leave stale ones."""
    del model.graph.value_info[:]
    for value in model.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")


_SHAPE_INPUT = {"Reshape": 1, "Expand": 1}  # operators that get a shape as a constant input


def change_batch(model: Any, shapes: Mapping[str, Sequence[int]], old: int, new: int) -> None:
    """Rewrite a model of static batch ``old`` for the input ``shapes``, whose first dimension is ``new``.

    Reshape, Expand and Resize constants that begin with the old batch get the new one. Raises UnsupportedModel where
    the batch is built into the graph in another way. The constants of the model must be folded (onnx_fold.fold).
    """
    before = skeleton(model)
    forget_shapes(before)
    known = dict(fold(before))
    for node in model.graph.node:  # folding drops these, and the names behind them
        if node.op_type in ("Dropout", "Identity") and node.output[0] not in known and node.input[0] in known:
            known[node.output[0]] = known[node.input[0]]
    set_input_shapes(model, shapes)
    initial = {t.name: t for t in model.graph.initializer}
    fresh: dict[str, str] = {}
    for node in model.graph.node:
        k = _SHAPE_INPUT.get(node.op_type) if node.op_type != "Resize" else 3
        if k is None or len(node.input) <= k or node.input[k] not in initial:
            continue
        _retarget(model, node, k, initial, fresh, known, (old, new))
    _verify_batch(model, known, old, new)


def _stuck(what: str, new: int) -> UnsupportedModel:
    return UnsupportedModel(f"batch {new}: {what}; export the model with a dynamic batch, or with this batch")


def _label(node: Any) -> str:
    return f"{node.op_type} node '{node.name or node.output[0]}'"


def _retarget(
    model: Any,
    node: Any,
    k: int,
    initial: dict[str, Any],
    fresh: dict[str, str],
    known: Mapping[str, TypeShape],
    change: tuple[int, int],
) -> None:
    """Give ``node`` the shape constant (its input ``k``) for the new batch; ``fresh``: constants made so far."""
    old, new = change
    source, result = (known.get(n, (0, None))[1] for n in (node.input[0], node.output[0]))
    target = numpy_helper.to_array(initial[node.input[k]]).copy()
    if source is None or result is None or not target.size or node.input[0] in initial:
        return
    if node.op_type == "Reshape":
        if int(target[0]) == -1 or (int(target[0]) == 0 and not _allows_zero(node)) or not source or source[0] != old:
            return  # follows its input, or works on something without a leading batch; _verify_batch has the last word
        if int(target[0]) != old:
            raise _stuck(f"{_label(node)} merges the batch of {old} into {list(map(int, target))}", new)
    elif int(target[0]) != old or len(source) != len(target) or source[0] != old:
        return
    if node.input[k] not in fresh:
        target[0] = new
        taken = set(initial) | {n for m in model.graph.node for n in m.output}
        name = f"{node.input[k]}_batch{new}"
        while name in taken:
            name += "_"
        model.graph.initializer.append(numpy_helper.from_array(target, name))
        fresh[node.input[k]] = name
    node.input[k] = fresh[node.input[k]]


def _allows_zero(node: Any) -> bool:
    return any(a.name == "allowzero" and a.i for a in node.attribute)


def _verify_batch(model: Any, known: Mapping[str, TypeShape], old: int, new: int) -> None:
    if any(node.domain not in ("", "ai.onnx") for node in model.graph.node):
        return  # ONNX cannot infer those, and the importer refuses them
    trial = skeleton(model)
    try:
        fold(trial)
        now = infer(trial, strict=True)
    except onnx.shape_inference.InferenceError as err:
        raise _stuck(f"the graph is written for batch {old}: {one_line(err, 200)}", new) from None
    for value in model.graph.output:
        was, shape = known.get(value.name, (0, None))[1], now.get(value.name, (0, None))[1]
        if was is None or shape is None:
            continue  # the importer checks that every shape is static
        if not was or was[0] != old or shape != (new, *was[1:]):
            raise _stuck(
                f"output '{value.name}' {_show(was)} would become {_show(shape)} instead of growing with the batch", new
            )
