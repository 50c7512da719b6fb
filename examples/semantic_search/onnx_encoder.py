"""Encoders as ONNX graphs, with the weights of `paddle.nn.TransformerEncoder`, and ONNX Runtime and OpenVINO that run
them.

The graphs are of ordinary operators, in the form that both libraries find attention, GELU, and layer norm with residual
in, and fuse. The `onnx` package is needed to make one; `fuse` needs `onnxruntime` as well.
"""

from __future__ import annotations

import logging
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .model_files import EncoderConfig

OPSET = 17  # the first with layer norm
HIDDEN_SCORE = -10000.0  # what ONNX Runtime takes for a mask when it fuses


class Graph:
    """Nodes and constants of a graph that is being written; values are known by their names."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(value, dtype), name))
        return name

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output and return the output's name."""
        name = f"{operator.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def linear(self, x: str, state: Mapping[str, np.ndarray], name: str) -> str:
        product = self.add("MatMul", x, self.constant(state[name + ".weight"]))
        return self.add("Add", product, self.constant(state[name + ".bias"]))

    def layer_norm(self, x: str, state: Mapping[str, np.ndarray], name: str, epsilon: float) -> str:
        scale, bias = (self.constant(state[f"{name}.{part}"]) for part in ("weight", "bias"))
        return self.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)

    def model(self, inputs: Sequence[tuple[str, int, Sequence[Any]]], output: str, shape: Sequence[Any]) -> Any:
        """The finished model: inputs are names, types and shapes, the output is float32 and called ``output``."""
        self._nodes.append(helper.make_node("Identity", [output], ["output"]))
        graph = helper.make_graph(
            self._nodes,
            "encoder",
            [helper.make_tensor_value_info(*value) for value in inputs],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
            self._constants,
        )
        # A version of the file format that other libraries' releases know already.
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def add_attention(
    graph: Graph,
    x: str,
    state: Mapping[str, np.ndarray],
    num_heads: int,
    epsilon: float,
    mask: str | None = None,
    layer: str = "layers.0.",
) -> str:
    """Append the attention half of a layer, with residual and layer norm; see :func:`add_encoder`.

    Args:
        mask: the name of a value that is added to the scores, or None.
        layer: what stands before the names in `state`.
    """
    width = state[f"{layer}norm1.weight"].size
    split = graph.constant([0, 0, num_heads, width // num_heads], np.int64)
    query, key, value = (
        graph.add(
            "Transpose",
            graph.add("Reshape", graph.linear(x, state, f"{layer}self_attn.{name}_proj"), split),
            perm=order,
        )
        for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3]))
    )
    scores = graph.add("Div", graph.add("MatMul", query, key), graph.constant((width // num_heads) ** 0.5))
    if mask is not None:
        scores = graph.add("Add", scores, mask)
    attended = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), value)
    merge = graph.constant([0, 0, width], np.int64)
    attended = graph.add("Reshape", graph.add("Transpose", attended, perm=[0, 2, 1, 3]), merge)
    attended = graph.linear(attended, state, f"{layer}self_attn.out_proj")
    return graph.layer_norm(graph.add("Add", attended, x), state, f"{layer}norm1", epsilon)


def add_encoder(
    graph: Graph,
    x: str,
    state: Mapping[str, np.ndarray],
    num_heads: int,
    epsilon: float,
    keep: str | None = None,
    prefix: str = "",
) -> str:
    """Append the layers of an encoder that normalises after attention and feed-forward, with exact GELU.

    Args:
        graph: what to append to.
        x: the name of a value [B, S, E] float32.
        state: the weights, under the names of `paddle.nn.TransformerEncoder`.
        num_heads: of each layer.
        epsilon: of each layer norm.
        keep: the name of a value [B, S] int64, 0 where a key is not seen; None sees all.
        prefix: what stands before the names in `state`.

    Returns:
        The name of the result [B, S, E].
    """
    half, one, root_2 = (graph.constant(value) for value in (0.5, 1.0, 2**0.5))
    mask = None
    if keep is not None:
        axes = [graph.constant([axis], np.int64) for axis in (1, 2)]
        unsqueezed = graph.add("Unsqueeze", graph.add("Unsqueeze", keep, axes[0]), axes[1])
        hidden = graph.add("Sub", one, graph.add("Cast", unsqueezed, to=TensorProto.FLOAT))
        mask = graph.add("Mul", hidden, graph.constant(HIDDEN_SCORE))
    i = 0
    while f"{prefix}layers.{i}.norm1.weight" in state:
        layer = f"{prefix}layers.{i}."
        x = add_attention(graph, x, state, num_heads, epsilon, mask, layer)
        u = graph.linear(x, state, f"{layer}linear1")
        cumulative = graph.add("Add", graph.add("Erf", graph.add("Div", u, root_2)), one)
        u = graph.add("Mul", graph.add("Mul", u, cumulative), half)
        x = graph.layer_norm(
            graph.add("Add", graph.linear(u, state, f"{layer}linear2"), x), state, f"{layer}norm2", epsilon
        )
        i += 1
    return x


def sentence_encoder(config: EncoderConfig, state: Mapping[str, np.ndarray]) -> Any:
    """The model of `SentenceEncoder` with the weights of `state`: ``token_ids`` and ``keep`` [B, S] int64, B and S
    unknown, to ``output`` [B, hidden_size]."""
    graph = Graph()
    length = graph.add("Shape", "token_ids", start=1, end=2)
    start, axis = graph.constant([0], np.int64), graph.constant([0], np.int64)
    position = graph.add("Slice", graph.constant(state["position.weight"]), start, length, axis)
    x = graph.add("Gather", graph.constant(state["word.weight"]), "token_ids")
    x = graph.add("Add", graph.add("Add", x, position), graph.constant(state["token_type.weight"][0]))
    x = graph.layer_norm(x, state, "norm", config.layer_norm_eps)
    x = add_encoder(graph, x, state, config.num_attention_heads, config.layer_norm_eps, "keep", "encoder.")
    kept = graph.add("Unsqueeze", graph.add("Cast", "keep", to=TensorProto.FLOAT), graph.constant([2], np.int64))
    tokens = graph.constant([1], np.int64)
    total = graph.add("ReduceSum", graph.add("Mul", x, kept), tokens, keepdims=0)
    mean = graph.add("Div", total, graph.add("ReduceSum", kept, tokens, keepdims=0))
    sentence = graph.add("Div", mean, graph.add("ReduceL2", mean, axes=[-1]))
    inputs = [(name, TensorProto.INT64, ["batch", "tokens"]) for name in ("token_ids", "keep")]
    return graph.model(inputs, sentence, ["batch", config.hidden_size])


@contextmanager
def _no_remarks() -> Iterator[None]:
    """Logs nothing below a warning inside."""
    level = logging.root.manager.disable
    logging.disable(max(level, logging.INFO))
    try:
        yield
    finally:
        logging.disable(level)


def fuse(model: Any, num_heads: int, width: int, num_layers: int, feed_forward: bool = True) -> Any:
    """Let ONNX Runtime's transformer optimizer put its own operators in the place of what it finds.

    Args:
        feed_forward: whether the layers have it, or attention alone.

    Raises:
        RuntimeError: attention, bias with GELU, or layer norm with residual was not found in every layer.
    """
    from onnxruntime.transformers import optimizer

    with tempfile.TemporaryDirectory() as folder, _no_remarks():
        path = Path(folder) / "encoder.onnx"
        onnx.save(model, str(path))
        fused = optimizer.optimize_model(
            str(path), model_type="bert", num_heads=num_heads, hidden_size=width, opt_level=0, use_gpu=False
        )
    halves = num_layers if feed_forward else 0
    expected = {"Attention": num_layers, "BiasGelu": halves, "SkipLayerNormalization": num_layers + halves}
    found = {name: len(fused.get_nodes_by_op_type(name)) for name in expected}
    if found != expected:
        raise RuntimeError(f"ONNX Runtime's optimizer: expected {expected}, got {found}")
    return fused.model


Run = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""Inputs by name to the output."""


def onnxruntime_run(model: Any, num_threads: int) -> Run:
    """A session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, dict(inputs))[0]


def openvino_run(model: Any, num_threads: int, precision: str = "f32") -> Run:
    """A model compiled for the CPU; `precision` is "f32" or "bf16". The next run overwrites the output."""
    import openvino

    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": num_threads,
    }
    core = openvino.Core()
    request = core.compile_model(core.read_model(model.SerializeToString()), "CPU", config).create_infer_request()
    return lambda inputs: request.infer(dict(inputs), share_inputs=True, share_outputs=True)[0]
