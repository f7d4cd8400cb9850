"""The map: a file that says which layers of one model share distant keys, and what that was decided on.

Written by `kvservice calibrate pod`, read by whoever shares keys. A map that isn't whole, or was made for another
model, is refused: keys shared by wrong layers give wrong answers in silence.

Torch-free. Knows nothing of how similarity is measured, and of models only their figures.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvservice.compression.layer_groups import LayerGroups, Linkage, Per, Runs, Similarity
from kvservice.errors import ConfigError

FORMAT: Final = "kvservice-pod-map"
VERSION: Final = 1

MAKE_ANOTHER: Final = "make one with `kvservice calibrate pod`"

_Share = Annotated[float, Field(ge=0, le=1)]
_Hex = Annotated[str, Field(pattern="^[0-9a-f]+$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelFacts(_Record):
    """What of a model decides whether a map is for it. `name` and `origin` don't: they are for people."""

    name: str
    origin: str
    weights_digest: Annotated[str, Field(min_length=1)]
    num_layers: Annotated[int, Field(ge=1)]
    num_heads: Annotated[int, Field(ge=1)]
    num_kv_heads: Annotated[int, Field(ge=1)]
    head_dim: Annotated[int, Field(ge=1)]
    rope_theta: Annotated[float, Field(gt=0)]
    qk_norm: bool

    @property
    def fingerprint(self) -> str:
        """32 hex digits that stand for the model."""
        return _digest(self.model_dump(exclude={"name", "origin"}))


class CalibrationText(_Record):
    """What was read of one text."""

    name: str
    sha256: _Hex
    """Of the whole file."""
    first_token: Annotated[int, Field(ge=0)]
    """Where in the text the part begins that was read."""


class Measurement(_Record):
    """How the attention was measured."""

    texts: Annotated[tuple[CalibrationText, ...], Field(min_length=1)]
    context_tokens: Annotated[int, Field(ge=1)]
    queries: Annotated[int, Field(ge=1)]
    """The last ones of each text; their attention was compared."""
    sink_tokens: Annotated[int, Field(ge=0)]
    distant_tokens: Annotated[int, Field(ge=1)]
    """After the sinks. Only attention to these was compared."""
    dtype: str
    """Of weights and keys: bf16 or fp32."""
    seed: int

    @property
    def text_digest(self) -> str:
        """32 hex digits that stand for all that was read."""
        parts = [[text.sha256, text.first_token] for text in self.texts]
        return _digest({"parts": parts, "context_tokens": self.context_tokens})


class Grouping(_Record):
    """How the groups were chosen."""

    delta: Annotated[float, Field(ge=0)]
    linkage: Linkage
    per: Per
    similarity: Literal["js", "mass"]
    """Which of the two similarities they were chosen by."""
    save_fraction: _Share | None
    """What was to be saved of the distant KV, if `delta` was found from that."""


_Matrices = tuple[tuple[tuple[_Share, ...], ...], ...]


class SharingMap(_Record):
    """One map. What is in it agrees with itself; whether it is for a model, `check_model` says."""

    format: Literal["kvservice-pod-map"] = FORMAT
    version: Literal[1] = VERSION
    tool: str
    """What wrote it, with its version."""
    model: ModelFacts
    model_fingerprint: _Hex
    measurement: Measurement
    text_digest: _Hex
    grouping: Grouping
    groups: Runs
    distant_mass: tuple[tuple[_Share, ...], ...]
    """`[kv][l]`: the mean share of attention that goes to distant tokens."""
    similarity: _Matrices
    """`[kv][l][l]`: 1 - JS."""
    mass_similarity: _Matrices
    """`[kv][l][l]`: 1 - JS times the distant mass."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> SharingMap:
        kv_heads, layers = self.model.num_kv_heads, self.model.num_layers
        for name in ("similarity", "mass_similarity"):
            _check_matrices(name, getattr(self, name), kv_heads, layers)
        if [len(row) for row in self.distant_mass] != [layers] * kv_heads:
            raise ValueError(f"distant_mass isn't {kv_heads} rows of {layers}")
        try:
            groups = self.layer_groups
        except ConfigError as error:
            raise ValueError(error.message) from None
        if (groups.num_kv_heads, groups.num_layers) != (kv_heads, layers):
            raise ValueError(
                f"groups are for {groups.num_kv_heads} KV heads of {groups.num_layers} layers, the model has "
                f"{kv_heads} of {layers}"
            )
        if self.grouping.per is Per.LAYER and not groups.is_per_layer:
            raise ValueError("groups are per layer, but differ between KV heads")
        if self.model_fingerprint != self.model.fingerprint:
            raise ValueError("model_fingerprint isn't that of model")
        if self.text_digest != self.measurement.text_digest:
            raise ValueError("text_digest isn't that of measurement")
        return self

    @property
    def layer_groups(self) -> LayerGroups:
        """The groups."""
        return LayerGroups.of_runs(self.groups)

    @property
    def grouped_by(self) -> Similarity:
        """The similarity that the groups were chosen by."""
        return self.mass_similarity if self.grouping.similarity == "mass" else self.similarity

    def check_model(self, model: ModelFacts) -> None:
        """Refuses a model other than the map's own.

        Raises:
            ConfigError: it differs; the message says in what.
        """
        if model.fingerprint == self.model.fingerprint:
            return
        mine, other = (facts.model_dump(exclude={"name", "origin"}) for facts in (self.model, model))
        differ = ", ".join(f"{key} {mine[key]} there, {other[key]} here" for key in mine if mine[key] != other[key])
        raise ConfigError(
            f"the map was made for {self.model.name!r}, not for this {model.name!r} ({differ}): {MAKE_ANOTHER}",
            reason="map_other_model",
        )

    def write(self, path: Path) -> None:
        """Writes the map, with a checksum.

        Raises:
            ConfigError: the file can't be written.
        """
        record = self.model_dump(mode="json")
        # A line for each part: people can read it, and compare two.
        lines = [f'"{key}": {json.dumps(part)}' for key, part in {**record, "checksum": _digest(record)}.items()]
        try:
            path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"map {path}: can't be written: {error.strerror}") from error


def read_map(path: Path, model: ModelFacts) -> SharingMap:
    """The map in a file, found whole and made for `model`.

    Raises:
        ConfigError: there is none, it is damaged or of another version, or it was made for another model.
    """
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"map {path}: can't be read: {error.strerror}", reason="map_missing") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it isn't JSON ({error})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise _damaged(path, f'it has no "format": "{FORMAT}"')
    if record.get("version") != VERSION:
        raise ConfigError(
            f"map {path}: version {record.get('version')!r}, this release reads {VERSION}: {MAKE_ANOTHER}",
            reason="map_version",
        )
    checksum = record.pop("checksum", None)
    try:
        # Validated as JSON: there a list is a tuple, and still no string is a number.
        read = SharingMap.model_validate_json(json.dumps(record))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}") from None
    if checksum != _digest(record):
        raise _damaged(path, "its checksum is that of other contents")
    read.check_model(model)
    return read


def _check_matrices(name: str, matrices: Similarity, kv_heads: int, layers: int) -> None:
    if [len(matrix) for matrix in matrices] != [layers] * kv_heads or any(
        len(row) != layers for matrix in matrices for row in matrix
    ):
        raise ValueError(f"{name} isn't {kv_heads} matrices of {layers} x {layers}")
    if any(matrix[a][b] != matrix[b][a] for matrix in matrices for a in range(layers) for b in range(a)):
        raise ValueError(f"{name} isn't symmetric")


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(f"map {path} is damaged: {why}; {MAKE_ANOTHER}", reason="map_damaged")


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"kv1-pod-map").hexdigest()
