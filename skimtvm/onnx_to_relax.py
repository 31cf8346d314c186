"""Convert a prepared ONNX model to Relax with TVM's importer, keeping track of which node each call comes from."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from typing import Any

import onnx.defs
import onnx.numpy_helper
import tvm
from tvm import relax
from tvm.ir import SourceName, Span
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.relax.frontend.onnx import onnx_frontend

from .errors import SkimError, UnsupportedModel
from .onnx_converters import CONVERTERS
from .onnx_read import graphs, one_line
from .onnx_recurrent import GATES, MOST_STEPS
from .onnx_types import quantised

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv1d_transpose", "conv2d_transpose", "conv3d_transpose")
ANCHORS = frozenset(("relax.matmul", *(f"relax.nn.{name}" for name in _CONVOLUTIONS)))
_LISTED = 10
_DATA_SHAPES = ("relax.tensor_to_shape",)
_DTYPES = frozenset(
    ("float32", "float64", "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
)


def make_span(name: str) -> Any:
    """The span that carries a layer name."""
    return Span(SourceName(name), 0, 0, 0, 0)


def is_anchor(expr: Any) -> bool:
    """Whether ``expr`` is the call of a convolution or matrix product."""
    return isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name in ANCHORS


def misread(node: Any, constants: dict[str, bool]) -> str:
    """What makes ``node`` one that TVM's importer converts to something else without an error; "" if nothing does.

    ``constants``: truth of the scalar initializers.
    """
    attrs = {a.name: a for a in node.attribute}
    for name in ("kernel_shape", "strides", "dilations"):
        if name in attrs and any(v < 1 for v in attrs[name].ints):
            return f"{name}={list(attrs[name].ints)}"
    if node.op_type == "BatchNormalization" and "training_mode" in attrs and attrs["training_mode"].i:
        return "training_mode=1"
    if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2] and constants.get(node.input[2], True):
        return "training_mode"
    if node.op_type == "ConvTranspose" and "output_shape" in attrs:
        return "output_shape"
    if node.op_type == "LayerNormalization" and len([o for o in node.output if o]) > 1:
        return "outputs Mean and InvStdDev"
    if node.op_type == "RoiAlign" and "mode" in attrs and attrs["mode"].s == b"max":
        return "mode=max"
    if node.op_type == "NonMaxSuppression":
        return "a result whose size depends on data"
    if node.op_type == "SpaceToDepth" and "mode" in attrs and attrs["mode"].s != b"DCR":
        return f"mode={attrs['mode'].s.decode()}"
    return ""


def left_out(node: Any, opset: int) -> str:
    """Which required input of ``node`` is missing, for messages; "" if none is. TVM takes it for a value, and crashes."""
    try:
        formal = onnx.defs.get_schema(node.op_type, opset).inputs
    except onnx.defs.SchemaError:
        return ""
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    for k, name in enumerate(node.input):
        if not name and formal and formal[min(k, len(formal) - 1)].option != optional:
            return f"input {k} left out"
    return ""


def check_operators(model: Any, opset: int) -> None:
    """Raise UnsupportedModel with every node that has no converter, those in subgraphs included."""
    known = onnx_frontend._get_convert_map().keys() | CONVERTERS.keys()
    bad, hints = [], []
    scalars = [t for t in model.graph.initializer if not t.dims or list(t.dims) == [1]]
    constants = {t.name: bool(onnx.numpy_helper.to_array(t).reshape(-1)[0]) for t in scalars}
    for graph in graphs(model.graph):
        for node in graph.node:
            custom = node.domain not in ("", "ai.onnx")
            wrong = "" if custom else misread(node, constants) or left_out(node, opset)
            if not custom and not wrong and node.op_type in known and not quantised(node.op_type):
                continue
            op = f"{node.domain}.{node.op_type}" if custom else node.op_type
            version = (
                next((o.version for o in model.opset_import if o.domain == node.domain), opset) if custom else opset
            )
            op += f" with {wrong}" if wrong else ""
            bad.append(f"{op} (node '{node.name}', opset {version})")
            if quantised(node.op_type):
                hints.append("export the float32 model instead of the quantised one")
            elif node.op_type in GATES:
                hints.append(
                    f"recurrent layers need sequences of full length, activations without parameters and at most "
                    f"{MOST_STEPS} steps in the network"
                )
            elif node.op_type in ("If", "Loop", "Scan"):
                hints.append("control flow works only where its condition is constant")
    if bad:
        more = f" and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
        hint = "; ".join(dict.fromkeys(hints)) or "replace them in the model before export"
        raise UnsupportedModel(f"unsupported operators: {', '.join(bad[:_LISTED])}{more}; {hint}")


def _static_shape(ty: Any) -> tuple[int, ...] | None:
    shape = getattr(ty, "shape", None)
    if shape is None or not isinstance(shape, relax.ShapeExpr):
        return None
    dims = [d for d in shape.values if isinstance(d, tvm.tirx.IntImm)]
    return tuple(int(d) for d in dims) if len(dims) == len(shape.values) else None


def _dtype_of(ty: Any) -> str:
    return str(ty.dtype.dtype if hasattr(ty.dtype, "dtype") else ty.dtype)


class _Importer(onnx_frontend.ONNXGraphImporter):
    """TVM's importer with three changes: each node's result is bound at once, so that bindings follow the order of
    the nodes; anchors carry the name of their node; dynamic shapes are refused where they appear."""

    def __init__(self) -> None:
        super().__init__({}, {})
        self.where = "its inputs"
        self._names: dict[str, int] = {}

    def _check_for_unsupported_ops(self, graph: Any) -> None:
        """Nothing: ``check_operators`` did, and knows the converters of this package."""

    def _sanitize_name(self, name: str) -> str:
        plain = re.sub(r"\W", "_", name) or "input"
        return str(self._name_supply.fresh_name(plain if not plain[0].isdigit() else "input_" + plain))

    def _span(self, node: str) -> Any:
        n = self._names[node] = self._names.get(node, -1) + 1
        return make_span(f"{node}.{n}" if n else node)

    def _bind_anchors(self, expr: Any, node: str, memo: list[tuple[Any, Any]]) -> Any:
        """Bind every anchor in ``expr`` with the name of its node, and replace it by its variable.

        The arguments of an anchor are bound first: normalisation rebuilds a call with nested arguments without span.
        """
        if isinstance(expr, relax.Tuple):
            fields = [self._bind_anchors(f, node, memo) for f in expr.fields]
            same = all(a.same_as(b) for a, b in zip(fields, expr.fields, strict=True))
            return expr if same else relax.Tuple(fields)
        if isinstance(expr, relax.TupleGetItem):
            value = self._bind_anchors(expr.tuple_value, node, memo)
            return expr if value.same_as(expr.tuple_value) else relax.TupleGetItem(value, expr.index)
        if not isinstance(expr, relax.Call):
            return expr
        for seen, result in memo:
            if seen.same_as(expr):
                return result
        args = [self._bind_anchors(a, node, memo) for a in expr.args]
        result = expr
        if is_anchor(expr):
            args = [self.bb.emit(a) if isinstance(a, relax.Call) else a for a in args]
            result = self.bb.emit(relax.Call(expr.op, args, expr.attrs, expr.ty_args, self._span(node)))
        elif not all(a.same_as(b) for a, b in zip(args, expr.args, strict=True)):
            result = relax.Call(expr.op, args, expr.attrs, expr.ty_args, expr.span)
        memo.append((expr, result))
        return result

    def _convert_operator(self, op_name: str, inputs: Any, attrs: dict[str, Any], opset: int) -> Any:
        node = attrs["tvm_custom"]["name"]
        self.where = f"{op_name} node '{node}'"

        def tvm_own(values: Any) -> Any:
            default = onnx_frontend._get_convert_map()[op_name].get_converter(opset)
            padded = onnx_frontend.onnx_input()
            padded.extend(values)
            return default(self.bb, padded, attrs, [self._nodes, self._params])

        own = CONVERTERS.get(op_name)
        result = own(self.bb, list(inputs), attrs, tvm_own) if own else tvm_own(inputs)
        if not isinstance(result, relax.Expr):
            return result
        result = self.bb.normalize(self._bind_anchors(result, node, []))
        if isinstance(result, relax.Call) and isinstance(result.ty, relax.TensorType):
            result = self.bb.emit(result)
        self._check_static(result)
        return result

    def _check_static(self, result: Any) -> None:
        fields = result.ty.fields if isinstance(result.ty, relax.TupleType) else [result.ty]
        for ty in fields:
            if not isinstance(ty, relax.TensorType):
                continue
            shape = _static_shape(ty)
            if shape is None:
                raise UnsupportedModel(
                    f"{self.where}: the shape of its result depends on data; compile a model whose shapes are fixed"
                )
            if _dtype_of(ty) not in _DTYPES:
                raise UnsupportedModel(
                    f"{self.where}: its result is {_dtype_of(ty)}, which cannot be computed on a CPU"
                )
            if any(d < 1 for d in shape):  # TVM gives a slice backwards a negative size
                raise UnsupportedModel(
                    f"{self.where}: its result is empty, shape {shape}; give inputs that are large enough"
                )


@mutator
class _NameRest(PyExprMutator):  # type: ignore[misc]
    """Names the anchors that a converter bound itself, out of sight of ``_bind_anchors``."""

    def __init__(self, mod: Any) -> None:
        super().__init__(mod)
        self.count = 0

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        if not is_anchor(call) or call.span is not None:
            return call
        self.count += 1
        name = f"{call.op.name.rpartition('.')[2]}#{self.count}"
        return relax.Call(call.op, call.args, call.attrs, call.ty_args, make_span(name))


def _unnamed(func: Any) -> bool:
    bindings = [b for block in func.body.blocks for b in block.bindings]
    return any(is_anchor(b.value) and b.value.span is None for b in bindings)


def convert(model: Any, opset: int) -> tuple[Any, list[tuple[tuple[int, ...], str]]]:
    """Relax module of a prepared model, and (shape, dtype) of each output.

    ``model``: from importer.prepare_onnx. Raises UnsupportedModel, naming the node where that is known.
    """
    check_operators(model, opset)
    if not model.graph.node:
        raise UnsupportedModel("model: every output is an input or a constant, so there is nothing to compile")
    importer = _Importer()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            mod = importer.from_onnx(model.graph, opset)
    except Exception as err:  # converters raise whatever they like
        with contextlib.suppress(Exception):
            importer.bb._end_block()  # else the builder complains on stderr when it is collected
        if isinstance(err, SkimError):
            raise
        first = next((line for line in str(err).splitlines() if line.strip()), "")
        raise UnsupportedModel(
            f"{importer.where} (opset {opset}) cannot be imported: {one_line(f'{type(err).__name__}: {first}')}"
        ) from None
    mod = relax.transform.CanonicalizeBindings()(mod)
    if _unnamed(mod["main"]):
        rest = _NameRest(mod)
        for gv, func in list(mod.functions_items()):
            if isinstance(func, relax.Function):
                rest.builder_.update_func(gv, rest.visit_expr(func))
        mod = rest.builder_.get()
    results = _check_main(mod["main"])
    if len(results) != len(model.graph.output):
        raise UnsupportedModel("model: an output is a sequence of tensors; export it with tensors as outputs")
    return mod, results


def _check_main(main: Any) -> list[tuple[tuple[int, ...], str]]:
    blocks = list(main.body.blocks)
    if not any(block.bindings for block in blocks):
        raise UnsupportedModel("model: every output is an input or a constant, so there is nothing to compile")
    if len(blocks) != 1 or not isinstance(blocks[0], relax.DataflowBlock):
        raise UnsupportedModel("model: its graph is not one dataflow block; remove control flow before export")
    for binding in blocks[0].bindings:
        if isinstance(binding.value, relax.Call) and getattr(binding.value.op, "name", "") in _DATA_SHAPES:
            raise UnsupportedModel(
                "model: the shape of a value depends on data; compile a model whose shapes are fixed"
            )
        fields = binding.var.ty.fields if isinstance(binding.var.ty, relax.TupleType) else [binding.var.ty]
        if any(isinstance(ty, relax.TensorType) and _static_shape(ty) is None for ty in fields):
            raise UnsupportedModel(f"tensor '{binding.var.name}' has no static shape; bind every input dimension")
    fields = main.ret_ty.fields if isinstance(main.ret_ty, relax.TupleType) else [main.ret_ty]
    results = []
    for k, ty in enumerate(fields):
        shape = _static_shape(ty)
        if not isinstance(ty, relax.TensorType) or shape is None:
            raise UnsupportedModel(
                f"output {k} of the model is not a tensor of static shape; bind every input dimension"
            )
        results.append((shape, _dtype_of(ty)))
    return results
