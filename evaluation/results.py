"""Results of an evaluation as JSON lines: one measured point per line, so that an interrupted run goes on.

A point is one model at one length. Its line says what was measured, of what (content hashes of weights, data and
settings), and on which machine. A file holds the points of one task on the same data with the same settings; whatever
would mix two of them is refused.
"""

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

import torch
import transformers
from filelock import FileLock, Timeout
from transformers.utils import logging

from ..loading import weight_files
from ..storage.digests import digest, file_digest
from ..storage.disk import flush_to_disk
from ..storage.machine import device_name, processor
from ..storage.record import first_difference

logger = logging.get_logger(__name__)

# What decides the numbers of a saved model besides its weights: its configuration, also an adapter's, and its code.
MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json", "prime_config.json", "*.py")


@dataclass(frozen=True)
class Point:
    """One model at one length.

    Attributes:
        task: name of the task.
        label: of the model, in tables and pictures.
        spec: where the model comes from, as it was asked for.
        length: tokens of context.
        settings: all that decides the numbers besides model, data and length.
        numbers: what was measured, by name; None stands for a number that is not finite, which JSON does not have.
        environment: versions and device, as `environment` returns.
        identity: SHA-256 of the contents of `model`, `data` and `settings`.
    """

    task: str
    label: str
    spec: str
    length: int
    settings: dict
    numbers: dict
    environment: dict
    identity: dict

    def line(self) -> str:
        """The point as one line of JSON, its end included."""
        return json.dumps(finite(asdict(self)), allow_nan=False) + "\n"


def lock_path(path: Path) -> Path:
    """The file by which one process at a time writes a file of results."""
    return path.with_name(f".{path.name}.lock")


class ResultsFile:
    """The points of one run in one file; it is read at once and changed only by `append`.

    Args:
        path: of the file; it need not exist yet.

    Attributes:
        points: in the order of the file.

    Raises:
        ValueError: the file is damaged, or is no file of results. Only its last line may be torn (the process was
            killed while writing): it is left out with a warning.
    """

    def __init__(self, path: Path):
        self.path = path
        # Every line ends with a line break: what follows the last one was not written to its end.
        whole, torn = self._contents()
        if torn:
            logger.warning(f"{path}: its last line was not written to its end; that point is measured again.")
        self._whole_bytes, self._lock = len(whole), FileLock(lock_path(path))
        self.points = [_read_point(line, f"{path}, line {n}") for n, line in enumerate(whole.splitlines(), start=1)]

    def check(self, task: str, settings: dict, data: str, models: Mapping[str, str], device: str | None) -> None:
        """Check that the file belongs to a run, so that nothing is mixed.

        Args:
            task: its name.
            settings: of the run.
            data: digest of the run's data.
            models: digest of each model's contents, by label.
            device: what the numbers were measured on, where they depend on it; else None.

        Raises:
            ValueError: the file holds points of another task, other data, settings or devices, or of another model
                with the same label. The message names the first difference.
        """
        settings = json.loads(json.dumps(settings))
        for point in self.points:
            model = models.get(point.label, point.identity["model"])
            differences = {
                f"of the task {point.task!r}, not {task!r}": point.task != task,
                "measured on other data (other texts, another tokenizer, or another longest length, which decides "
                "which documents are long enough)": point.identity["data"] != data,
                _settings_difference(point.settings, settings): point.settings != settings,
                f"of another model with the label {point.label!r} (its files have changed since, or the label was "
                "given to another one)": point.identity["model"] != model,
                f"measured on {point.environment['device']!r}, not {device!r}": (
                    device not in (None, point.environment["device"])
                ),
            }
            for difference, differs in differences.items():
                if differs:
                    raise ValueError(
                        f"output: the results in {self.path} are {difference}. Choose another folder for this run, or "
                        "repeat that one as it was. Nothing was overwritten."
                    )

    def has(self, label: str, length: int) -> bool:
        """Whether the point is there. After `check` it is one of this run."""
        return any((point.label, point.length) == (label, length) for point in self.points)

    def append(self, point: Point) -> None:
        """Add a point; its line is on the disk when this returns. Use it inside `with results:`."""
        data = point.line().encode()
        with self.path.open("ab") as file:
            file.truncate(self._whole_bytes)  # a torn line gives way
            file.write(data)  # one write, so that no other process sees a part of a line that is shorter than a block
        flush_to_disk(self.path)
        self._whole_bytes += len(data)
        self.points.append(_read_point(data, str(self.path)))

    def __enter__(self) -> Self:
        """Claim the file for this process; its folder is made where it is missing.

        Raises:
            ValueError: another process is writing it, or has done so since it was read.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"output: another process is writing {self.path}; wait for its end or choose another folder"
            ) from error
        if len(self._contents()[0]) != self._whole_bytes:
            self._lock.release()
            raise ValueError(f"output: another process has written {self.path} meanwhile; start the command again")
        return self

    def __exit__(self, *_) -> None:
        self._lock.release()

    def _contents(self) -> tuple[bytes, bytes]:
        """The whole lines of the file, and what was written of one more."""
        data = self.path.read_bytes() if self.path.exists() else b""
        end = data.rfind(b"\n") + 1
        return data[:end], data[end:]


def tokens_digest(ids: torch.Tensor) -> str:
    """SHA-256 of token ids (int64, any shape) and their shape."""
    return hashlib.sha256(f"{list(ids.shape)} ".encode() + ids.contiguous().numpy().tobytes()).hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 of the contents of a saved model's configuration and weights, each with its name.

    Raises:
        ValueError: there are no weights in the folder.
    """
    files = [*weight_files(folder), *(path for pattern in MODEL_FILES for path in folder.glob(pattern))]
    return digest({path.name: file_digest(path) for path in files})


def environment() -> dict[str, str | int]:
    """What numbers depend on besides model, data and settings: versions, device and threads."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        name = f"{os.cpu_count()} CPU cores, {processor()}"
    else:
        name = device_name(device) if device.type == "cuda" else str(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
    }


def finite(value: object) -> object:
    """A JSON value with None in place of every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [finite(part) for part in value]
    return value


def _read_point(line: bytes, where: str) -> Point:
    try:
        point = Point(**json.loads(line))
        kinds = {name: type(value) for name, value in vars(point).items()}
        if kinds != {field.name: field.type for field in fields(Point)} or {"model", "data"} - point.identity.keys():
            raise TypeError("a field has another type")
        return point
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{where}: is no point of an evaluation ({error}). Repair or delete the line, or choose another folder; "
            "nothing was overwritten."
        ) from error


def _settings_difference(before: dict, now: dict) -> str:
    name, old, new = first_difference(before, now) or ("", None, None)
    return f"measured with {name}={old!r}, not {new!r}"
