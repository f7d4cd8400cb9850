"""The JSON files of a model folder in Hugging Face's layout. Knows nothing of tensors or tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from kvservice.errors import ModelError

FETCH_HINT = "fetch the default model with `kvservice model fetch smollm2-135m`, or get the folder again"


def read_text(folder: Path, name: str) -> str:
    """What is in `folder/name`.

    Raises:
        ModelError: the folder or the file is missing, or it isn't UTF-8.
    """
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} doesn't exist: {FETCH_HINT}", reason="model_missing")
    try:
        return (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelError(f"model folder {folder} has no {name}: {FETCH_HINT}", reason="model_missing") from None
    except UnicodeDecodeError as error:
        raise ModelError(f"{folder / name} isn't UTF-8 ({error}): {FETCH_HINT}", reason="model_damaged") from None


def read_json(folder: Path, name: str) -> Mapping[str, object]:
    """The object in `folder/name`.

    Raises:
        ModelError: the folder or the file is missing, or it isn't a JSON object.
    """
    path = folder / name
    try:
        value = json.loads(read_text(folder, name))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{path} isn't valid JSON ({error}): {FETCH_HINT}", reason="model_damaged") from None
    if not isinstance(value, dict):
        raise ModelError(
            f"{path} holds a JSON {type(value).__name__}, not an object: {FETCH_HINT}", reason="model_damaged"
        )
    return value


def read_optional_json(folder: Path, name: str) -> Mapping[str, object]:
    """Like `read_json`, but an absent file is an empty object."""
    return read_json(folder, name) if (folder / name).exists() else {}


def read_eos_token_ids(folder: Path) -> frozenset[int]:
    """The ids that end an answer: those of generation_config.json together with those of config.json."""
    ids: set[int] = set()
    for source in (read_json(folder, "config.json"), read_optional_json(folder, "generation_config.json")):
        value = source.get("eos_token_id")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int):
                ids.add(item)
    return frozenset(ids)


_SEPARATORS = frozenset({".", ",", "?", "!", ";", ":", " ", "\t", "\n", "\n\n"})
"""Texts of tokens that end a part of a sentence."""

_BYTE_MARKS = str.maketrans({"\u0120": " ", "\u010a": "\n", "\u0109": "\t", "\u2581": " "})
"""What vocabularies of byte-level BPE, and of SentencePiece, write for white space."""


def read_separator_ids(folder: Path) -> frozenset[int]:
    """Ids of tokens that are a punctuation mark or white space and nothing else; none if the vocabulary is no map."""
    model = read_json(folder, "tokenizer.json").get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict):
        return frozenset()
    return frozenset(number for text, number in vocab.items() if text.translate(_BYTE_MARKS) in _SEPARATORS)
