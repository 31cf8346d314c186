"""SkimTVM behind ONNX's backend interface: ``prepare``, ``run_model``, ``run_node`` of ``onnx.backend.base``.

>>> import skimtvm.onnx_backend as backend
>>> outputs = backend.run_model(model, [image])                       # doctest: +SKIP

The interface says nothing about types, so this adaptor takes and returns what the model declares where the module
itself computes in float32, and it accepts parameters that a compiled module must know beforehand (the target of a
Reshape, the axes of a reduction) as ordinary inputs: the model is then compiled again for each new value of them.
"""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.shape_inference
from onnx import TensorProto, numpy_helper
from onnx.backend.base import Backend, BackendRep

import skimtvm

from .errors import InputMismatch, InvalidOption, SkimError, UnsupportedModel

CACHED_MODULES = 8  # compiled variants that one SkimRep keeps, when parameters are fed as inputs
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
# Inputs that decide the shape of a result or the code of the operator, by position.
_PARAMETERS: dict[str, tuple[int, ...]] = {
    **{f"Reduce{name}": (1,) for name in _REDUCTIONS},
    **{name: (1,) for name in ("Reshape", "Expand", "Tile", "Squeeze", "Unsqueeze", "Split", "TopK")},
    "OneHot": (1, 2),
    **{name: (1,) for name in ("CumSum", "CenterCropPad", "Trilu", "Upsample")},
    **{"Slice": (1, 2, 3, 4), "Pad": (1, 2, 3), "Resize": (1, 2, 3), "Clip": (1, 2), "ConstantOfShape": (0,)},
    **{"Range": (0, 1, 2), "Dropout": (1, 2), "BlackmanWindow": (0,), "HannWindow": (0,), "HammingWindow": (0,)},
}


def parameters(model: onnx.ModelProto) -> list[str]:
    """Graph inputs that are nothing but parameters of operators: every node that reads one needs it as a constant."""
    weights = {t.name for t in model.graph.initializer}
    names = {v.name for v in model.graph.input} - weights
    uses: dict[str, list[bool]] = {}
    for node in model.graph.node:
        for k, name in enumerate(node.input):
            if name in names:
                uses.setdefault(name, []).append(k in _PARAMETERS.get(node.op_type, ()))
    return [v.name for v in model.graph.input if uses.get(v.name) and all(uses[v.name])]


def bind(model: onnx.ModelProto, values: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A copy of ``model`` in which the inputs ``values`` are constants."""
    bound = onnx.ModelProto()
    bound.CopyFrom(model)
    keep = [v for v in model.graph.input if v.name not in values]
    del bound.graph.input[:]
    bound.graph.input.extend(keep)
    for name, value in values.items():
        bound.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return bound


class SkimRep(BackendRep):
    """A compiled model. ``inputs`` of ``run``: arrays in the order of the graph inputs, one array, or a mapping."""

    def __init__(self, model: onnx.ModelProto, options: Mapping[str, Any]) -> None:
        self.model, self.options = model, dict(options)
        weights = {t.name for t in model.graph.initializer}
        self._inputs = [v.name for v in model.graph.input if v.name not in weights]
        self._outputs = [(v.name, v.type.tensor_type.elem_type) for v in model.graph.output]
        self._variants: OrderedDict[tuple[bytes, ...], skimtvm.Module] = OrderedDict()
        self._parameters: list[str] = []
        try:
            self._variants[()] = skimtvm.compile(model, **options)
        except UnsupportedModel:
            self._parameters = parameters(model)
            if not self._parameters:
                raise

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Outputs in the order of the graph, as a named tuple where their names allow it. Raises a SkimError."""
        feeds = self._feeds(inputs)
        module = self._module(feeds)
        arrays = {spec.name: _as(feeds[spec.name], spec.dtype) for spec in module.inputs if spec.name in feeds}
        arrays.update(
            {name: value for name, value in feeds.items() if name not in arrays and name not in self._parameters}
        )
        found = module.run(arrays, **kwargs)
        return _named([name for name, _ in self._outputs], [_declared(found[name], t) for name, t in self._outputs])

    def _feeds(self, inputs: Any) -> dict[str, Any]:
        if isinstance(inputs, Mapping):
            return dict(inputs)
        values = list(inputs) if isinstance(inputs, Sequence) else [inputs]
        if len(values) > len(self._inputs):
            raise InputMismatch(f"{len(values)} inputs given, but the model has {len(self._inputs)}: feed one for each")
        return dict(zip(self._inputs, values, strict=False))

    def _module(self, feeds: Mapping[str, Any]) -> skimtvm.Module:
        values = {name: np.asarray(feeds[name]) for name in self._parameters if name in feeds}
        key = tuple(
            part for v in values.values() for part in (str(v.dtype).encode(), str(v.shape).encode(), v.tobytes())
        )
        if key not in self._variants:
            self._variants[key] = skimtvm.compile(bind(self.model, values), **self.options)
            while len(self._variants) > CACHED_MODULES:
                self._variants.popitem(last=False)
        self._variants.move_to_end(key)
        return self._variants[key]


def _as(value: Any, dtype: str) -> np.ndarray:
    """``value`` as the module takes it: a float of another width becomes float32."""
    array = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
    if dtype == "float32" and array.dtype != np.float32 and _is_float(array.dtype):
        with np.errstate(over="ignore"):
            wide, array = array, array.astype(np.float32)
        if not np.array_equal(np.isfinite(array), np.isfinite(wide)):
            raise InputMismatch(f"a {wide.dtype} input holds values beyond float32, in which the module computes")
    return array


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _declared(array: np.ndarray, elem_type: int) -> np.ndarray:
    """``array`` in the float type that the model declares for this output."""
    if array.dtype != np.float32 or elem_type not in (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE):
        return array
    with np.errstate(over="ignore"):
        return array.astype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))


def _named(names: list[str], values: list[np.ndarray]) -> tuple[Any, ...]:
    if not all(n.isidentifier() and not n.startswith("_") for n in names) or len(set(names)) != len(names):
        return tuple(values)
    return namedtuple("Outputs", names, rename=True)(*values)


class SkimBackend(Backend):
    """``onnx.backend.base.Backend``; the keyword arguments are the fields of ``CompileOptions``. Device: CPU."""

    @classmethod
    def supports_device(cls, device: str) -> bool:
        return device.split(":", maxsplit=1)[0] == "CPU"

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether the model can be imported; nothing is compiled."""
        from .importer import load_model

        try:
            load_model(model, input_shapes=kwargs.get("input_shapes"), batch=kwargs.get("batch"))
        except UnsupportedModel:
            return bool(parameters(model))
        except SkimError:
            return False
        return cls.supports_device(device)

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> SkimRep:
        """Compile ``model``. Raises a SkimError."""
        if not cls.supports_device(device):
            raise InvalidOption(f"device '{device}' is unknown; SkimTVM compiles for the CPU")
        return SkimRep(model, kwargs)

    @classmethod
    def run_node(
        cls, node: onnx.NodeProto, inputs: Any, device: str = "CPU", outputs_info: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Compile and run one operator on ``inputs``, arrays in the order of its named inputs."""
        opset = kwargs.pop("opset_version", onnx.defs.onnx_opset_version())
        names = [name for name in dict.fromkeys(node.input) if name]
        values = [np.asarray(a) for a in (inputs if isinstance(inputs, Sequence) else [inputs])]
        if len(values) != len(names):
            raise InputMismatch(
                f"{node.op_type} node: {len(values)} inputs given, {len(names)} named: feed one for each"
            )
        typed = [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in zip(names, values, strict=True)
        ]
        results = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        graph = onnx.helper.make_graph([node], node.op_type, typed, results)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
        return cls.prepare(onnx.shape_inference.infer_shapes(model), device, **kwargs).run(values)


is_compatible = SkimBackend.is_compatible
prepare = SkimBackend.prepare
run_model = SkimBackend.run_model
run_node = SkimBackend.run_node
supports_device = SkimBackend.supports_device
