"""Checkpoints of the official JAX implementation into folders of transformers, and back.

All that can be wrong is found before the first tensor is written, a new folder appears whole or not at all, and no
more than one shard of it is ever in memory.
"""

import difflib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from huggingface_hub.errors import StrictDataclassError
from tqdm.auto import tqdm
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .. import TTTE2EConfig
from ..configuration import load_config, preset_names
from ..data.tokenizer import load_tokenizer
from ..storage.disk import check_disk_space, folder_written_whole
from ..storage.dtypes import dtype_named
from ..storage.record import check_output, saved_folder
from .official_layout import (
    check_shapes,
    config_from_official,
    config_to_official,
    empty_leaves,
    expected_tensors,
    sizes_of_shapes,
    tensor_from_official,
    tensor_to_official,
)
from .orbax import (
    DTYPES,
    METADATA,
    WEIGHTS,
    OrbaxReader,
    array_names,
    find_weights,
    import_tensorstore,
    write_array,
    write_metadata,
)
from .remote_folder import download, open_folder
from .weight_files import StoredWeights, split_into_shards, stored_weights, write_shards

logger = logging.get_logger(__name__)

MAX_SHARD_SIZE = "50GB"  # as in transformers' save_pretrained
OFFICIAL_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
SMALL_FILES = 2**20  # bytes for configurations, indices and metadata


def convert_official(
    checkpoint: str,
    size: str,
    output: str | Path,
    *,
    tokenizer: str | None = None,
    dtype: str = "float32",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    project: str | None = None,
) -> str:
    """Convert an official checkpoint into a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        checkpoint: root (its newest step is taken), step folder or `model_weights`; a path, or an address of fsspec as
            gs://bucket/path, which is downloaded first.
        size: as `official_config`.
        output: the new folder; may exist if it is empty.
        tokenizer: a folder or an id of the Hub, saved into the output; its ids must fit the vocabulary.
        dtype: of the output, `float32` or `bfloat16`.
        max_shard_size: bytes, or a text as "5GB". One shard is in memory at once, besides a layer's tensor and, where
            the checkpoint's chunks reach over layers, the chunks of one stacked tensor.
        project: that pays for reading a requester-pays bucket of Google Cloud Storage.

    Returns:
        The `model_weights` folder that was read.

    Raises:
        ImportError: tensorstore, or the package for the address, is not installed.
        ValueError: the output holds files; there is no Orbax checkpoint, or one whose tensors are not those of the
            size; a wrong argument.
        OSError: there is no such folder, the address cannot be reached, or the disk has no room.
    """
    import_tensorstore()
    output = Path(output).expanduser()
    check_output(output, resume=False)
    config = official_config(size)
    torch_dtype = dtype_named(dtype, DTYPES)
    own_tokenizer = None if tokenizer is None else _own_tokenizer(tokenizer, config)
    sizes = {
        target: math.prod(tensor.target_shape) * torch_dtype.itemsize
        for tensor in expected_tensors(config)
        for target in tensor.targets
    }
    split = split_into_shards(sizes, max_shard_size)
    filesystem, path, is_local = open_folder(checkpoint, project)
    weights = find_weights(filesystem, path)
    if is_local:
        _check_fits(OrbaxReader(Path(weights)).shapes, config, size)
    else:
        _check_names(array_names(filesystem.cat_file(f"{weights}/{METADATA}").decode(), weights), config, size)
    download_bytes = 0 if is_local else filesystem.du(weights)
    check_disk_space(output, split.metadata["total_size"] + download_bytes + SMALL_FILES, "the converted model")
    with folder_written_whole(output) as part:
        local = Path(weights) if is_local else download(filesystem, weights, part / WEIGHTS)
        reader = OrbaxReader(local)
        _check_fits(reader.shapes, config, size)
        write_shards(part, split, converted_tensors(reader, config, torch_dtype))
        if not is_local:
            shutil.rmtree(local)
        _write_settings(part, config, dtype, own_tokenizer)
    return weights


def export_official(model: str | Path, output: str | Path) -> None:
    """Write a saved model in the official layout, as step 0 of an Orbax checkpoint with the official `config.json`.

    Args:
        model: folder with `config.json` and safetensors, float32 or bfloat16; or a run's folder with `model` in it.
        output: the new folder; may exist if it is empty.

    Raises:
        ImportError: tensorstore is not installed.
        FileNotFoundError: there is no saved model in the folder.
        ValueError: the output holds files; it is no TTT-E2E model, or one that the official model cannot express.
        OSError: the disk has no room.
    """
    import_tensorstore()
    output = Path(output).expanduser()
    check_output(output, resume=False)
    folder = saved_folder(Path(model).expanduser())
    if folder is None:
        raise FileNotFoundError(f"model={str(model)!r}: no config.json in it; name the folder of a saved model")
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, TTTE2EConfig):
        raise ValueError(f"model={str(model)!r} is a {config.model_type} model; only ttt_e2e has an official layout")
    official = config_to_official(config)
    stored = _checked_weights(folder, config)
    dtype = stored.dtypes["model.norm.weight"]
    official["model"]["param_dtype"] = OFFICIAL_DTYPES[dtype]
    tensors = list(expected_tensors(config))
    total = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
    check_disk_space(output, total + SMALL_FILES, "the official checkpoint")
    with folder_written_whole(output) as part:
        weights = part / "0" / WEIGHTS
        weights.mkdir(parents=True)
        for tensor in tqdm(tensors, desc="Writing", unit=" tensors"):
            slices = (
                tensor_to_official(stored.read(target), tensor.layout, config.head_dim) for target in tensor.targets
            )
            write_array(weights, tensor.name, tensor.shape, dtype, slices, stacked=tensor.stacked)
        write_metadata(weights, {tensor.name: tensor.shape for tensor in tensors}, empty_leaves(config))
        (part / "config.json").write_text(json.dumps(official, indent=2) + "\n", encoding="utf-8")


def official_sizes() -> list[str]:
    """Names of the presets that an official checkpoint can have."""
    return [name for name in preset_names() if isinstance(load_config(name), TTTE2EConfig)]


def official_config(size: str) -> TTTE2EConfig:
    """The configuration of an official checkpoint.

    Args:
        size: a preset, as "125m", or the path of a .json file with the official configuration's groups `model` and
            `training`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown preset, or a file that lacks a field or describes another kind of model.
    """
    if not size.endswith(".json"):
        sizes = official_sizes()
        if size in sizes:
            return cast(TTTE2EConfig, load_config(size))
        near = difflib.get_close_matches(size, sizes, n=1, cutoff=0.0)[0]
        known = ", ".join(name for name in sizes if "-" not in name)
        raise ValueError(
            f"size={size!r} is unknown; did you mean {near!r}? Known are {known} (and their baselines, as "
            "125m-full-attention), or give the path of a config.json with the groups `model` and `training`"
        )
    path = Path(size).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"size={size!r}: there is no such file")
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
        return config_from_official(groups["model"], groups["training"])
    except KeyError as error:
        raise ValueError(
            f"size={size!r}: the field {error} is missing; it must hold the groups `model` and `training` of the "
            "official configuration"
        ) from error
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"size={size!r}: {error}") from error


def converted_tensors(
    reader: OrbaxReader, config: TTTE2EConfig, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of `TTTE2EForCausalLM.state_dict()` (a tied head left out), read when it is asked for."""
    for official in expected_tensors(config):
        slices = reader.slices(official.name) if official.stacked else [reader.read(official.name)]
        for target, one in zip(official.targets, slices, strict=True):
            yield target, tensor_from_official(one, official.layout, config.head_dim).to(dtype)


def _check_names(names: Iterable[str], config: TTTE2EConfig, size: str) -> None:
    """The part of `_check_fits` that needs no arrays."""
    own = {tensor.name: tensor.shape for tensor in expected_tensors(config)}
    _check_fits({name: own.get(name, ()) for name in names}, config, size)


def _check_fits(shapes: Mapping[str, tuple[int, ...]], config: TTTE2EConfig, size: str) -> None:
    try:
        check_shapes(shapes, config)
    except ValueError as error:
        told = {field: (value, getattr(config, field)) for field, value in sizes_of_shapes(shapes).items()}
        fields = "".join(
            f" `{field}` is {theirs} in the checkpoint but {own} in this size."
            for field, (theirs, own) in told.items()
            if theirs != own
        )
        fitting = [name for name in official_sizes() if _fits(shapes, name)]
        remedy = f"fitting are {', '.join(fitting)}" if fitting else "give the checkpoint's own config.json"
        raise ValueError(
            f"size={size!r} does not fit the checkpoint.{fields} {error} Of the sizes: {remedy}"
        ) from error


def _fits(shapes: Mapping[str, tuple[int, ...]], size: str) -> bool:
    try:
        check_shapes(shapes, cast(TTTE2EConfig, load_config(size)))
    except ValueError:
        return False
    return True


def _own_tokenizer(source: str, config: TTTE2EConfig) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(source, config.vocab_size)
    if tokenizer.bos_token_id != config.bos_token_id:
        logger.warning(
            f"tokenizer={source!r}: its bos_token_id is {tokenizer.bos_token_id}, but the checkpoint was trained with "
            f"{config.bos_token_id}: it may not be the checkpoint's own tokenizer."
        )
    return tokenizer


def _write_settings(folder: Path, config: TTTE2EConfig, dtype: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
    config.architectures, config.dtype = ["TTTE2EForCausalLM"], dtype
    if tokenizer is not None:
        config.pad_token_id = tokenizer.pad_token_id
        tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def _checked_weights(folder: Path, config: TTTE2EConfig) -> StoredWeights:
    """The tensors of a saved model, which are those of the configuration, all of one dtype that the layout has."""
    weights = stored_weights(folder)
    expected = {target: tensor.target_shape for tensor in expected_tensors(config) for target in tensor.targets}
    for key in sorted(expected.keys() | weights.shapes.keys()):
        if expected.get(key) != weights.shapes.get(key):
            raise ValueError(
                f"model={str(folder)!r}: `{key}` has shape {weights.shapes.get(key, 'none, it is missing')}, but "
                f"config.json needs {expected.get(key, 'no such tensor')}"
            )
    dtypes = set(weights.dtypes.values())
    if len(dtypes) > 1 or not dtypes <= OFFICIAL_DTYPES.keys():
        raise ValueError(
            f"model={str(folder)!r} holds tensors of dtype {', '.join(sorted(map(str, dtypes)))}; all must be float32, "
            "or all bfloat16: load it with dtype=torch.float32 and save it again"
        )
    return weights
