"""Options that several commands share, and how their words become values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from kvservice.config.recipes import RECIPES, SERVED_RECIPES

if TYPE_CHECKING:
    from kvservice.internal.tls import PemFiles

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_MODEL = "smollm2-135m"
API_KEY_VARIABLE = "KVSERVICE_API_KEY"

_BYTE_SIZE = TypeAdapter(ByteSize)


def parse_bytes(text: str) -> int:
    """Bytes from words such as `512MiB`, `2GB` or `1048576`."""
    try:
        return int(_BYTE_SIZE.validate_python(text))
    except ValidationError:
        raise typer.BadParameter(f"{text!r} is not a size: write bytes or a unit, such as 512MiB or 2GB") from None


def parse_rate(text: str) -> int:
    """Bytes a second from words such as `25GB/s`."""
    number, slash, second = text.partition("/")
    if slash and second.strip() != "s":
        raise typer.BadParameter(f"{text!r} is not a speed: write bytes a second, such as 25GB/s")
    return parse_bytes(number)


def parse_counts(text: str) -> list[int]:
    """Whole numbers from words such as `512,2048`."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"{text!r}: write whole numbers of at least 1 with commas between, such as 512,2048")
    return [int(word) for word in words]


def parse_names(text: str) -> list[str]:
    """Names from words such as `dense,recall`. What names there are is for the caller to say."""
    return [word.strip() for word in text.split(",")]


def given(**settings: int | None) -> dict[str, int]:
    """The settings that were given; for the others the configuration's own defaults hold."""
    return {name: value for name, value in settings.items() if value is not None}


def check_recipe(name: str | None) -> str | None:
    """Refuses a name that is no recipe."""
    if name is not None and name not in RECIPES:
        raise typer.BadParameter(f"unknown recipe {name!r}: choose one of {', '.join(SERVED_RECIPES)}")
    return name


def api_key() -> str | None:
    """The caller's API key. Only from the environment: arguments are visible to every user of a machine."""
    return os.environ.get(API_KEY_VARIABLE) or None


def client_tls() -> PemFiles | None:
    """How to reach a service with TLS: from KVSERVICE_TLS_CA, and where it wants them KVSERVICE_TLS_CERT and _KEY."""
    ca, cert, key = (os.environ.get(f"KVSERVICE_TLS_{name}") for name in ("CA", "CERT", "KEY"))
    if not (ca or cert or key):
        return None
    from kvservice.internal.tls import PemFiles

    return PemFiles(Path(cert) if cert else None, Path(key) if key else None, Path(ca) if ca else None)


Address = Annotated[str, typer.Option("--address", metavar="HOST:PORT", help="The gateway to call.")]
Model = Annotated[
    str, typer.Option("--model", metavar="NAME|FOLDER", help="A fetched model's name, or a model folder.")
]
Recipe = Annotated[
    str | None, typer.Option("--recipe", callback=check_recipe, help=f"One of {', '.join(SERVED_RECIPES)}.")
]
TextFiles = Annotated[
    list[Path], typer.Option("--texts", metavar="FILE|DIR", help="Texts, or folders of them; may be repeated.")
]
MoreTextFiles = Annotated[list[Path] | None, typer.Argument(metavar="[FILE|DIR]...", help="Further texts.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write config, environment and results to FILE.")
]
KvBytes = Annotated[
    int | None,
    typer.Option("--kv-bytes", parser=parse_bytes, metavar="SIZE", help="Device memory for all KV, such as 512MiB."),
]
HostBytes = Annotated[
    int | None,
    typer.Option("--host-bytes", parser=parse_bytes, metavar="SIZE", help="Host memory for distant KV, such as 4GiB."),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. Unset: the cores.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the documents' random tokens.")]
Map = Annotated[
    Path | None,
    typer.Option(
        "--map",
        metavar="FILE",
        help="Which layers share distant keys, of `calibrate pod`. Recipes pod and pod-exact need it.",
    ),
]
AdapterFile = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="FILE",
        help="Weights trained for that map, of `adapt pod`. Only recipes pod and pod-exact are served then.",
    ),
]
Sharing = Annotated[
    str | None,
    typer.Option("--sharing", help="Layers without distant keys score by their anchor's queries (score) or own (key)."),
]
SkipAbove = Annotated[
    float | None,
    typer.Option(
        "--skip-above",
        min=0,
        max=1,
        metavar="SHARE",
        help="Such layers leave distant tokens out where what is near has this share. Unset: never.",
    ),
]
HostLink = Annotated[
    int | None,
    typer.Option(
        "--host-link",
        parser=parse_rate,
        metavar="SPEED",
        help="Simulation: KV comes from host memory no faster than this, such as 25GB/s.",
    ),
]
