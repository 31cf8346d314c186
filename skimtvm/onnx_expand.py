"""Rewrite ONNX operators that TVM's importer lacks or misreads into plainer ones: functions that ONNX itself defines are
replaced by their bodies, recurrent layers by their steps, transposed convolutions get their padding written out.
Nothing here needs TVM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import onnx.checker
import onnx.defs
import onnx.helper
import onnx.inliner
import onnx.version_converter

from .errors import UnsupportedModel
from .onnx_fold import drop_dead
from .onnx_infer import TypeShape, infer
from .onnx_read import MIN_OPSET, one_line, opset_of, skeleton
from .onnx_recurrent import unroll
from .onnx_resize import plain_resizes

_DOMAIN = "skimtvm.expanded"
_ROUNDS = 4  # bodies that call other functions of this list
_FUNCTIONS = frozenset(
    [
        *("Attention", "CausalConvWithState", "LinearAttention", "RotaryEmbedding", "SwiGLU", "Swish", "Celu", "Mish"),
        *("BlackmanWindow", "HammingWindow", "HannWindow", "CenterCropPad"),
        *("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss", "MeanVarianceNormalization"),
    ]
)


def _wanted(node: Any) -> bool:
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "LayerNormalization":
        return len([o for o in node.output if o]) > 1
    if node.op_type == "SpaceToDepth":
        return any(a.name == "mode" and a.s != b"DCR" for a in node.attribute)
    return node.op_type in _FUNCTIONS


def expand(model: Any) -> bool:
    """Expand such nodes of the main graph in place; True if there were any. Input shapes must be final."""
    changed = _pad_transposed(model) | unroll(model)
    for _ in range(_ROUNDS):
        if not any(_wanted(n) for n in model.graph.node) or not _round(model):
            break
        changed = True
    return plain_resizes(model) or changed


def _round(model: Any) -> bool:
    types = infer(model)
    functions = {}
    for k, node in enumerate(model.graph.node):
        body = _body(node, types, opset_of(model)) if _wanted(node) else None
        if body is not None:
            functions[k] = body
    if not functions:
        return False
    trial = skeleton(model)
    for k, body in functions.items():
        node = trial.graph.node[k]
        body.name, body.domain = f"{node.op_type}_{k}", _DOMAIN
        _write_defaults(node, opset_of(model))
        node.op_type, node.domain = body.name, _DOMAIN
        trial.functions.append(body)
    trial.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    inlined = onnx.inliner.inline_local_functions(trial)
    del model.graph.node[:]
    model.graph.node.extend(inlined.graph.node)
    drop_dead(model)
    return True


def _body(node: Any, types: Mapping[str, TypeShape], opset: int) -> Any:
    """FunctionProto that defines ``node`` at ``opset``; None where ONNX has none for its attributes and types."""
    schema = onnx.defs.get_schema(node.op_type, opset)
    known = [types.get(name, (0, None)) if name else (0, None) for name in node.input]
    if any(elem == 0 for name, (elem, _) in zip(node.input, known, strict=True) if name):
        return None
    typed = [onnx.helper.make_tensor_type_proto(*t) if t[0] else onnx.TypeProto() for t in known]
    data = b""
    if schema.has_context_dependent_function:
        versions = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
        for version in sorted(versions, reverse=True)[:1]:
            data = schema.get_context_dependent_function_with_opset_version(
                version, node.SerializeToString(), [t.SerializeToString() for t in typed]
            )
    elif schema.has_function:
        versions = [v for v in schema.function_opset_versions if v <= opset]
        for version in sorted(versions, reverse=True)[:1]:
            data = schema.get_function_with_opset_version(version)
    if not data:
        return None
    body = onnx.FunctionProto.FromString(data)
    del body.opset_import[:]
    body.opset_import.append(onnx.helper.make_opsetid("", opset))
    return body


def _write_defaults(node: Any, opset: int) -> None:
    """Give ``node`` the attributes that its schema has defaults for: the body refers to them."""
    present = {a.name for a in node.attribute}
    for name, formal in onnx.defs.get_schema(node.op_type, opset).attributes.items():
        if name not in present and formal.default_value.name:
            node.attribute.append(formal.default_value)


def upgrade(model: Any) -> Any:
    """``model`` of an opset before ``MIN_OPSET`` in that opset. Raises UnsupportedModel where ONNX cannot convert it."""
    try:
        converted = onnx.version_converter.convert_version(model, MIN_OPSET)
        onnx.checker.check_model(skeleton(converted))  # operators that the converter does not know pass unchanged
        return converted
    except Exception as err:  # ConvertError, or whatever the bindings raise
        raise UnsupportedModel(
            f"model: opset {opset_of(model)} is older than {MIN_OPSET} and ONNX cannot convert it "
            f"({one_line(err, 120)}); export it with opset 13 or newer"
        ) from None


def _pad_transposed(model: Any) -> bool:
    """Replace ``output_shape`` and ``auto_pad`` of ConvTranspose by the padding that they stand for."""
    nodes = [n for n in model.graph.node if n.op_type == "ConvTranspose" and n.domain in ("", "ai.onnx")]
    nodes = [n for n in nodes if any(a.name == "output_shape" for a in n.attribute)]
    types = infer(model) if nodes else {}
    changed = False
    for node in nodes:
        attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        data, weight = (types.get(name, (0, None))[1] for name in node.input[:2])
        if data is None or weight is None or len(data) != len(weight) or len(data) < 3:
            continue
        rank = len(data) - 2
        want = list(attrs["output_shape"])[-rank:]
        ones = [1] * rank
        stride, dilation = attrs.get("strides", ones), attrs.get("dilations", ones)
        kernel, extra = attrs.get("kernel_shape", weight[2:]), attrs.get("output_padding", [0] * rank)
        total = [
            stride[i] * (data[2 + i] - 1) + extra[i] + (kernel[i] - 1) * dilation[i] + 1 - want[i] for i in range(rank)
        ]
        # More output than the kernel reaches: the rest is padding of zeros at the end, as output_padding has it.
        extra = [e + max(-t, 0) for e, t in zip(extra, total, strict=True)]
        total = [max(t, 0) for t in total]
        upper = attrs.get("auto_pad", b"NOTSET") == b"SAME_UPPER"
        begin = [t // 2 if upper else t - t // 2 for t in total]
        end = [t - b for t, b in zip(total, begin, strict=True)]
        for name in ("output_shape", "auto_pad", "pads", "output_padding"):
            for k in reversed([k for k, a in enumerate(node.attribute) if a.name == name]):
                del node.attribute[k]
        node.attribute.append(onnx.helper.make_attribute("pads", begin + end))
        node.attribute.append(onnx.helper.make_attribute("output_padding", extra))
        changed = True
    return changed
