"""The program: embed the corpus in several ways, say how far apart and how fast they are, answer the queries."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import textwrap
from functools import partial
from typing import Sequence

import numpy as np
import paddle

from .corpus import Entry, load_corpus
from .embedding import Encode, dygraph_encode, embed, make_batches, nearest, without_padding
from .encoder import State, fused_encoder, paddle_state, plain_encoder
from .model_files import EncoderConfig, find_model_directory, load_config, load_tokenizer, load_weights
from .static_encoder import StaticEncoder

TOLERANCE = 1e-5
FUSED = "fused layers"


class RequestError(ValueError):
    """More answers were asked for than there are texts."""


class DifferenceError(RuntimeError):
    """Two encoders with the same weights do not agree."""


def run(queries: Sequence[str], top: int) -> None:
    """Do the whole job and print it.

    Args:
        queries: what to look for, none of them empty.
        top: how many answers to print for each.

    Raises:
        ModelFilesError: the model's package is missing or damaged.
        RequestError: there are not `top` texts.
        DifferenceError: another encoder differs from the fused one by 1e-5 or more.
    """
    corpus = load_corpus()
    if top > len(corpus):
        raise RequestError(f"--top: expected at most {len(corpus)}, the number of texts, got {top}")
    directory = find_model_directory()
    config, weights, tokenizer = load_config(directory), load_weights(directory), load_tokenizer(directory)
    state = paddle_state(weights, config)
    fused = without_padding(dygraph_encode(fused_encoder(config, state)))
    static = StaticEncoder(fused_encoder(config, state))

    batches = make_batches(tokenizer, [entry.text for entry in corpus])
    tokens = sum(int(batch.keep.sum()) for batch in batches)
    print(f"Paddle {paddle.__version__} on {paddle.get_device()}: {len(corpus)} texts, {tokens} tokens\n", flush=True)
    encoders: dict[str, Encode] = {
        FUSED: fused,
        f"the same, static program ({static.kind})": without_padding(static),
        "plain Paddle layers": dygraph_encode(plain_encoder(config, state)),
        **other_libraries(config, state),
    }
    results = {}
    for name, encode in encoders.items():
        embed(encode, batches[:1])  # the first run makes thread pools and caches
        results[name] = embed(encode, batches, name)
    print_comparison(results)
    embeddings = results[FUSED][0]
    query_embeddings, _ = embed(fused, make_batches(tokenizer, queries))
    for query, query_embedding in zip(queries, query_embeddings):
        print_answers(query, [(corpus[row], score) for row, score in nearest(embeddings, query_embedding, top)])


def other_libraries(config: EncoderConfig, state: State) -> dict[str, Encode]:
    """The encoder in ONNX Runtime and in OpenVINO, on the CPU, where they and `onnx` are installed."""
    found = [name for name in ("onnx", "onnxruntime", "openvino") if importlib.util.find_spec(name) is not None]
    if "onnx" not in found or len(found) == 1:
        return {}
    from . import onnx_encoder

    model = onnx_encoder.sentence_encoder(config, state)
    threads = int(os.environ["OMP_NUM_THREADS"])
    encoders = {}
    if "onnxruntime" in found:
        sizes = (config.num_attention_heads, config.hidden_size, config.num_hidden_layers)
        encoders["ONNX Runtime"] = onnx_encoder.onnxruntime_run(onnx_encoder.fuse(model, *sizes), threads)
    if "openvino" in found:
        encoders["OpenVINO"] = onnx_encoder.openvino_run(model, threads)

    def encode(run: onnx_encoder.Run, token_ids: np.ndarray, keep: np.ndarray) -> np.ndarray:
        return np.array(run({"token_ids": token_ids, "keep": keep.astype(np.int64)}))

    return {name: partial(encode, run) for name, run in encoders.items()}


def print_comparison(results: dict[str, tuple[np.ndarray, float]]) -> None:
    """Print each encoder's time and its largest difference from the first one.

    Raises:
        DifferenceError: a difference is 1e-5 or more, or not a number.
    """
    width = max(map(len, results))
    reference = next(iter(results.values()))[0]
    print(f"\n{'encoder':{width}}  {'seconds':>7}  {'texts/s':>7}  largest difference")
    failures = []
    for name, (embeddings, seconds) in results.items():
        difference = float(np.abs(embeddings - reference).max())
        shown = "" if embeddings is reference else f"{difference:.1e}"
        print(f"{name:{width}}  {seconds:7.2f}  {len(embeddings) / seconds:7.0f}  {shown}")
        if not difference < TOLERANCE:
            failures.append(
                f"{name}: differs from the fused encoder by {difference:.1e}, expected less than {TOLERANCE}"
            )
    sys.stdout.flush()
    if failures:
        raise DifferenceError("\n".join(failures))


def print_answers(query: str, answers: Sequence[tuple[Entry, float]]) -> None:
    """Print the answers to one query, a line each."""
    name_width = max(len(entry.name) for entry, _ in answers)
    text_width = max(20, shutil.get_terminal_size((120, 24)).columns - name_width - 14)
    print(f"\n{query}")
    for rank, (entry, score) in enumerate(answers, 1):
        also = f"(also {', '.join(entry.aliases)}) " if entry.aliases else ""
        text = textwrap.shorten(also + entry.description, text_width, placeholder=" ...")
        print(f"{rank:4}  {score:5.3f}  {entry.name:{name_width}}  {text}")
