"""Weights in safetensors files: read tensor by tensor, and written shard by shard."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as INDEX
from transformers.utils import SAFE_WEIGHTS_NAME as WEIGHTS

SHARDS = "model{suffix}.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of a folder, not read yet: by name their file, shape and dtype."""

    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)


def stored_weights(folder: Path) -> StoredWeights:
    """What the safetensors files of a folder hold; reads their headers only.

    Raises:
        FileNotFoundError: there are none, or one that the index names is missing.
        ValueError: a file is damaged, or holds something other than floating-point numbers.
    """
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        files = _files_of_index(folder / INDEX)
    else:
        raise FileNotFoundError(
            f"model={str(folder)!r}: no weights in it ({WEIGHTS} or {INDEX}); other formats become safetensors when "
            "the model is loaded with AutoModelForCausalLM and saved again"
        )
    places, shapes, dtypes = {}, {}, {}
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, but {INDEX} names it; fetch the model again")
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    part = tensors.get_slice(name)
                    places[name], shapes[name] = path, tuple(part.get_shape())
                    dtypes[name] = _dtype(name, part.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); fetch or save the model again") from error
    return StoredWeights(places, shapes, dtypes)


def split_into_shards(sizes: Mapping[str, int], max_shard_size: int | str) -> StateDictSplit:
    """Which file holds which tensors.

    Args:
        sizes: bytes of each tensor, in the order in which they are written.
        max_shard_size: bytes, or a text as "5GB".

    Raises:
        ValueError: `max_shard_size` is no size.
    """
    try:
        return split_state_dict_into_shards_factory(
            dict(sizes), get_storage_size=lambda size: size, filename_pattern=SHARDS, max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ValueError(f"max_shard_size={max_shard_size!r}: {error}; give it as in 5GB") from error


def write_shards(folder: Path, split: StateDictSplit, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write tensors into the files of a split, and their index where there are several, with a progress bar.

    A file is written, and its tensors are let go, as soon as all of them are there: where they come in the order of the
    split, one file's tensors are in memory at a time.

    Args:
        tensors: every tensor of the split by its name, contiguous.
    """
    shards, parameters = {}, 0
    with tqdm(total=len(split.tensor_to_filename), desc="Converting", unit=" tensors") as progress:
        for name, tensor in tensors:
            file = split.tensor_to_filename[name]
            shards.setdefault(file, {})[name] = tensor
            if len(shards[file]) == len(split.filename_to_tensors[file]):
                save_file(shards.pop(file), folder / file, metadata={"format": "pt"})
            parameters += tensor.numel()
            progress.update()
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _files_of_index(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error!r}); fetch or save the model again") from error
    return sorted(index.parent / name for name in names)


def _dtype(name: str, dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise ValueError(
            f"{name} is saved as {dtype}: quantised weights cannot be trained on; take the model that they were made "
            f"from ({', '.join(DTYPES)})"
        )
    return DTYPES[dtype]
