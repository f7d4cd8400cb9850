"""A training run in a file, so that one that was cut off goes on as if it hadn't been. Safetensors and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from kvservice.errors import ConfigError
from kvservice.models.tensor_file import read_tensors, write_tensors
from kvservice.training.trainer import Held, Step, Trainer

_KEY = "kvservice-training"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class Curve:
    """What was seen on the way, a row a step."""

    steps: list[Step] = field(default_factory=list)
    held: dict[int, Held] = field(default_factory=dict)
    """By the number of steps done before."""

    def write_csv(self, path: Path) -> None:
        """Writes all rows; figures of held-out texts are empty where they weren't measured.

        Raises:
            ConfigError: the file can't be written.
        """
        names = list(Held.__dataclass_fields__)
        first = {"step": 0} if 0 in self.held and self.steps else None
        rows = ([first] if first else []) + [asdict(step) for step in self.steps]
        try:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, [*Step.__dataclass_fields__, *(f"held_{name}" for name in names)])
                writer.writeheader()
                for row in rows:
                    held = self.held.get(int(row["step"]))
                    found = {} if held is None else {f"held_{name}": getattr(held, name) for name in names}
                    writer.writerow(row | found)
        except OSError as error:
            raise ConfigError(f"{path}: can't be written: {error.strerror}") from error


def save(path: Path, trainer: Trainer, curve: Curve, identity: Mapping[str, str]) -> None:
    """Writes all that a run needs to go on.

    Args:
        path: replaced as a whole.
        trainer: between two steps.
        curve: so far.
        identity: what it must have in common with the run that goes on: settings, model, map, texts.

    Raises:
        ConfigError: the file can't be written.
    """
    tensors = {}
    for number, parameter in enumerate(trainer.parameters):
        tensors[f"{number}.value"] = parameter.detach()
        for name in MOMENTS:
            moment = trainer.optimizer.state[parameter].get(name)
            tensors[f"{number}.{name}"] = torch.zeros_like(parameter) if moment is None else moment
    record = {
        "identity": dict(identity),
        "step": trainer.step_number,
        "steps": [asdict(step) for step in curve.steps],
        "held": {str(step): asdict(held) for step, held in curve.held.items()},
    }
    write_tensors(path, {name: tensor.cpu() for name, tensor in tensors.items()}, {_KEY: json.dumps(record)})


def load(path: Path, trainer: Trainer, identity: Mapping[str, str]) -> Curve:
    """Sets a new trainer to where a run was left, and returns its curve.

    Raises:
        ConfigError: the file is damaged, or is that of another run; the message says in what.
    """
    tensors, metadata = read_tensors(path)
    try:
        record = json.loads(metadata[_KEY])
        differ = [name for name, value in identity.items() if record["identity"].get(name) != value]
        if differ:
            raise ConfigError(
                f"{path}: is a run with other {', '.join(differ)}: give those it began with, name another --out, or "
                "delete the file to begin anew"
            )
        state = {}
        for number, parameter in enumerate(trainer.parameters):
            with torch.no_grad():
                parameter.copy_(tensors[f"{number}.value"])
            moments = {name: tensors[f"{number}.{name}"].to(parameter.device) for name in MOMENTS}
            state[number] = {"step": torch.tensor(float(record["step"])), **moments}
        groups = trainer.optimizer.state_dict()["param_groups"]
        trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
        trainer.step_number = int(record["step"])
        steps = [Step(**step) for step in record["steps"]]
        return Curve(steps, {int(step): Held(**held) for step, held in record["held"].items()})
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"{path}: no whole state of a training run ({error}): delete it to begin anew") from None


def latest(values: Mapping[int, Held]) -> Held | None:
    """The last that was measured."""
    return values[max(values)] if values else None


def tokens_per_second(steps: Sequence[Step], count: int = 20) -> float:
    """Over the last steps; 0 before there are two."""
    last = steps[-count:]
    if len(last) < 2:
        return 0.0
    return (last[-1].tokens - last[0].tokens) / sum(step.seconds for step in last[1:])
