"""Arrays in the layout of an Orbax checkpoint, read and written with tensorstore alone: no jax, no device.

    <root>/<step>/model_weights/_METADATA        json: every leaf of the tree by its keys, the empty ones included
    <root>/<step>/model_weights/manifest.ocdbt   the database of all arrays, each of them zarr under its dotted name

tensorstore is what orbax itself reads and writes with, so it is there wherever orbax is.
"""

import base64
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

METADATA, MANIFEST, WEIGHTS = "_METADATA", "manifest.ocdbt", "model_weights"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def import_tensorstore():
    """The package tensorstore.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import tensorstore
    except ImportError as error:
        raise ImportError(
            'official checkpoints need the package tensorstore: pip install tensorstore, or pip install "ttt-e2e[jax]"'
        ) from error
    return tensorstore


def find_weights(filesystem, path: str) -> str:
    """The `model_weights` folder of a checkpoint.

    Args:
        filesystem: of fsspec.
        path: in it: the checkpoint's root, whose newest step is taken, a step's folder, or `model_weights` itself.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no Orbax checkpoint, or an unfinished one.
    """
    path = path.rstrip("/")
    if not filesystem.isdir(path):
        raise FileNotFoundError(f"checkpoint={path!r}: there is no such folder")
    for folder in (path, f"{path}/{WEIGHTS}"):
        if filesystem.exists(f"{folder}/{METADATA}"):
            return _finished(filesystem, folder)
    names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in filesystem.ls(path, detail=False)]
    steps = [name for name in names if name.isdecimal()]
    if not steps:
        raise ValueError(
            f"checkpoint={path!r} is no Orbax checkpoint: neither {METADATA}, nor {WEIGHTS}, nor a step's folder (as "
            "0) is in it; give the folder that holds the steps, a step's folder, or its model_weights"
        )
    newest = f"{path}/{max(steps, key=int)}"
    if not filesystem.exists(f"{newest}/{WEIGHTS}/{METADATA}"):
        raise ValueError(
            f"checkpoint={path!r}: its newest step, {newest}, holds no {WEIGHTS}/{METADATA}; give the folder of a step "
            "that was written to its end"
        )
    return _finished(filesystem, f"{newest}/{WEIGHTS}")


def _finished(filesystem, folder: str) -> str:
    if not filesystem.exists(f"{folder}/{MANIFEST}"):
        raise ValueError(
            f"checkpoint={folder!r}: {MANIFEST} is missing, so the arrays cannot be found; it was not written, or not "
            "copied, to its end"
        )
    return folder


def array_names(metadata: str, source: str) -> list[str]:
    """Dotted names of the leaves that hold an array.

    Args:
        metadata: text of a `_METADATA` file.
        source: where it is from, for the message.

    Raises:
        ValueError: the text is not what Orbax writes.
    """
    try:
        leaves = json.loads(metadata)["tree_metadata"].values()
        return [
            ".".join(str(key["key"]) for key in leaf["key_metadata"])
            for leaf in leaves
            if leaf["value_metadata"]["value_type"] != "None"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: not the metadata of an Orbax checkpoint ({error!r})") from error


class OrbaxReader:
    """The arrays of a `model_weights` folder, one slice at a time.

    Args:
        folder: on this machine.

    Attributes:
        shapes: of every array, by its dotted name.
        dtypes: likewise, `float32` or `bfloat16`.

    Raises:
        ImportError: tensorstore is not installed.
        ValueError: the metadata is damaged, names an array that is not there, or one of another dtype.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        metadata = (self.folder / METADATA).read_text(encoding="utf-8")
        names = array_names(metadata, source=str(self.folder / METADATA))
        fields = json.loads(metadata)
        self._driver = "zarr3" if fields.get("use_zarr3") else "zarr"
        # Zeros in place of a lost chunk would go unnoticed. Orbax leaves chunks of zeros out only if it says so here.
        self._all_stored = bool(fields.get("store_array_data_equal_to_fill_value"))
        arrays = {name: self._open(name) for name in names}
        self.shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        self.dtypes = {name: array.dtype.name for name, array in arrays.items()}
        for name, dtype in self.dtypes.items():
            if dtype not in DTYPES:
                raise ValueError(f"{self.folder}: `{name}` is {dtype}; only {' and '.join(DTYPES)} can be converted")

    def slices(self, name: str) -> Iterator[torch.Tensor]:
        """The slices of an array along its first axis, each read when it is asked for."""
        array = self._open(name)
        chunks = array.chunk_layout.read_chunk.shape
        if chunks and chunks[0] > 1:
            # Every chunk holds several slices: without a cache it would be decoded again for each of them.
            array = self._open(name, cache_bytes=math.prod(array.shape) * array.dtype.numpy_dtype.itemsize)
        for index in range(array.shape[0]):
            yield self._read(array[index], name)

    def read(self, name: str) -> torch.Tensor:
        """All of an array."""
        return self._read(self._open(name), name)

    def _open(self, name: str, cache_bytes: int = 0):
        tensorstore = import_tensorstore()
        spec = {"driver": self._driver, "kvstore": _kvstore(self.folder, name)}
        if self._all_stored:
            spec["fill_missing_data_reads"] = False
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
        try:
            return tensorstore.open(spec, open=True, read=True, context=context).result()
        except ValueError as error:
            raise ValueError(
                f"{self.folder}: `{name}` is named in {METADATA} but cannot be opened ({_first_line(error)}); copy or "
                "download the checkpoint again"
            ) from error

    def _read(self, part, name: str) -> torch.Tensor:
        try:
            array = part.read().result()
        except ValueError as error:
            raise ValueError(
                f"{self.folder}: `{name}` cannot be read ({_first_line(error)}); copy or download the checkpoint again"
            ) from error
        array = np.require(array, requirements=["C", "W"])
        if array.dtype.name == "bfloat16":  # which numpy knows only by an extension that torch does not
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def write_array(
    folder: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, slices: Iterable[torch.Tensor], stacked: bool
) -> None:
    """Write an array into a `model_weights` folder, a slice at a time; it is not waited for the disk.

    Args:
        name: dotted.
        shape: of all of it.
        dtype: float32 or bfloat16.
        slices: along the first axis, in order; of an array that is not `stacked`, the whole as the only one.
    """
    spec = {
        "driver": "zarr",
        "kvstore": _kvstore(folder, name),
        "metadata": {
            "shape": list(shape),
            "chunks": [1, *shape[1:]] if stacked else list(shape),
            "compressor": {"id": "zstd", "level": 1},
        },
        "dtype": str(dtype).removeprefix("torch."),
        "store_data_equal_to_fill_value": True,
    }
    array = import_tensorstore().open(spec, create=True).result()
    for index, piece in enumerate(slices):
        (array[index] if stacked else array).write(_as_array(piece, array)).result()


def write_metadata(folder: Path, shapes: Mapping[str, tuple[int, ...]], empty: Iterable[str]) -> None:
    """Write what makes a folder of arrays an Orbax checkpoint: the tree in `model_weights`, and the step around it.

    Args:
        folder: `model_weights` within the step's folder.
        shapes: of the arrays by their dotted names.
        empty: dotted names of the leaves that are None.
    """
    leaves = {
        name: {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)}
        for name, shape in shapes.items()
    }
    leaves |= {name: {"value_type": "None", "skip_deserialize": True} for name in empty}
    tree = {
        str(tuple(name.split("."))): {
            "key_metadata": [{"key": key, "key_type": 2} for key in name.split(".")],  # 2: the key of a dict
            "value_metadata": value,
        }
        for name, value in leaves.items()
    }
    fields = {"tree_metadata": tree, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    (folder / METADATA).write_text(json.dumps(fields | {"custom_metadata": None}), encoding="utf-8")
    # Where arrays go if whoever restores them does not say: whole, onto the first device.
    sharding: dict[str, Any] = {"sharding_type": "NamedSharding", "shape": [1, 1], "axis_names": ["data", "state"]}
    sharding |= {"partition_spec": [], "device_mesh": {"mesh": [[{"id": 0}]]}}
    placed = {base64.b64encode(name.encode()).decode(): json.dumps(sharding) for name in shapes}
    (folder / "_sharding").write_text(json.dumps(placed), encoding="utf-8")
    handler = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
    now = time.time_ns()
    step = {
        "item_handlers": {folder.name: handler},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }
    (folder.parent / "_CHECKPOINT_METADATA").write_text(json.dumps(step), encoding="utf-8")


def _kvstore(folder: Path, name: str) -> dict:
    base = {"driver": "file", "path": f"{Path(folder).absolute()}/", "file_io_sync": False}
    return {"driver": "ocdbt", "base": base, "path": f"{name}/"}


def _as_array(piece: torch.Tensor, array) -> np.ndarray:
    if piece.dtype == torch.bfloat16:
        return piece.view(torch.int16).numpy().view(array.dtype.numpy_dtype)
    return piece.numpy()


def _first_line(error: Exception) -> str:
    """tensorstore's message without the specification that it appends."""
    return str(error).split(" [tensorstore_spec")[0].split("\n")[0]
