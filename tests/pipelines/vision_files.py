"""Small ONNX files and folders of networks that look at pictures, and hostile ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ANY_SIZE = (1, 3, "height", "width")


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[str],
    weights: Mapping[str, Any],
    shape: Sequence[int | str] = ANY_SIZE,
    names: object = None,
) -> Path:
    """Write a network that takes the picture `x`."""
    graph = helper.make_graph(
        list(nodes),
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    if names is not None:
        model.metadata_props.add(key="names", value=str(names))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def weighted_channels(
    path: Path, factors: Sequence[float], shape: Sequence[int | str] = ANY_SIZE, **save_as: Any
) -> Path:
    """A network whose answer is one map: the sum of the channels, each times its factor."""
    kernel = np.array(factors, np.float32).reshape(1, 3, 1, 1)
    return save(path, [helper.make_node("Conv", ["x", "k"], ["y"])], ["y"], {"k": kernel}, shape, **save_as)


def constant(path: Path, arrays: Sequence[np.ndarray[Any, Any]], side: tuple[int, int], names: object = None) -> Path:
    """A network that answers these arrays for any picture of a size (width, height)."""
    nodes, weights, outputs = [], {"zero": np.zeros(1, np.float32)}, []
    nodes.append(helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0))
    nodes.append(helper.make_node("Mul", ["mean", "zero"], ["nothing"]))
    for number, array in enumerate(arrays):
        weights[f"c{number}"] = array.astype(np.float32)
        outputs.append(f"y{number}")
        nodes.append(helper.make_node("Add", [f"c{number}", "nothing"], [f"y{number}"]))
    return save(path, nodes, outputs, weights, (1, 3, side[1], side[0]), names)


def classifier(path: Path, names: object) -> Path:
    """A network that answers the means of red, green and blue, times 4, as logits."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["y"]),
    ]
    return save(path, nodes, ["y"], {"w": 4 * np.eye(3, dtype=np.float32)}, (1, 3, 32, 32), names)


def endless(path: Path) -> Path:
    """A network whose loop does not end in a lifetime."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["still"]), helper.make_node("Add", ["sum", "one"], ["more"])],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]),
        ],
        [numpy_helper.from_array(np.ones(1, np.float32), "one")],
    )
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Reshape", ["mean", "flat"], ["start"]),
        helper.make_node("Loop", ["steps", "yes", "start"], ["y"], body=body),
    ]
    weights = {"steps": np.array(2**62), "yes": np.array(True), "flat": np.array([1])}
    return save(path, nodes, ["y"], weights)


def greedy(path: Path, gigabytes: int) -> Path:
    """A network of a few bytes that fills a tensor of some gigabytes."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Add", ["zeros", "mean"], ["y"]),
    ]
    return save(path, nodes, ["y"], {"shape": np.array([gigabytes, 2**28])})


def external(path: Path, place: str) -> Path:
    """A network whose weights are in a file at `place`."""
    weighted_channels(path, (1, 1, 1))
    model = onnx.load_model_from_string(path.read_bytes())
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=place)
    path.write_bytes(model.SerializeToString())
    return path


def with_external_attribute(path: Path, place: str) -> Path:
    """A network with a constant in a branch of a branch, whose value is in a file at `place`."""
    hidden = numpy_helper.from_array(np.zeros(12, np.float32), "hidden")
    hidden.ClearField("raw_data")
    hidden.data_location = TensorProto.EXTERNAL
    hidden.external_data.add(key="location", value=place)
    output = [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)]
    branch = helper.make_graph([helper.make_node("Constant", [], ["inner"], value=hidden)], "branch", [], output)
    nodes = [helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)]
    return save(path, nodes, ["y"], {"yes": np.array(True)})


def declaring(path: Path, sides: Sequence[int]) -> Path:
    """A network with a weight that declares a shape and holds nothing."""
    weighted_channels(path, (1, 1, 1))
    model = onnx.load_model_from_string(path.read_bytes())
    model.graph.initializer[0].ClearField("raw_data")
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend(sides)
    path.write_bytes(model.SerializeToString())
    return path
