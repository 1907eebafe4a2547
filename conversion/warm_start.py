"""A warm start on the disk: from the folder of a pretrained transformer to the folder of a TTT-E2E model.

Tensors are read one by one and written shard by shard, so that memory holds one shard of the new model at most. The
new folder appears when it is complete: until then it has a temporary name beside it.
"""

from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit
from transformers import PreTrainedTokenizerBase

from .. import TTTE2EConfig
from ..data.tokenizer import load_tokenizer
from ..storage.disk import check_disk_space, folder_written_whole
from ..storage.dtypes import DTYPES, dtype_named
from ..storage.record import check_output
from .gguf_file import LoadedWeights
from .pretrained import GENERATION, SourceContents, find_source
from .transformer_layout import (
    EMBEDDINGS,
    HEAD,
    TensorPlan,
    WarmStartSettings,
    check_convertible,
    config_from_transformer,
    new_tensor,
    plan_tensors,
)
from .weight_files import StoredWeights, split_into_shards, write_shards

# A tokenizer that was changed by saving would cut one of these into other tokens.
PROBES = ("The old mill, 1853:\n\n  naïve façade — 水车.", " leading and trailing ", "")


@dataclass(frozen=True)
class WarmStartRequest:
    """What to convert, how, and where to.

    Attributes:
        model: a folder that `save_pretrained` has written, a GGUF file or a folder with one, or an id of the Hub.
        output: the new folder; must not exist, or be empty.
        settings: of the new model.
        dtype: of all tensors, a key of `DTYPES`; "auto" leaves each as it is (of a GGUF file: float32).
        seed: of the prime MLPs' random weights.
        max_shard_size: of a file of weights, in bytes or as "5GB"; also bounds the memory that is used.
    """

    model: str
    output: Path
    settings: WarmStartSettings
    dtype: str = "auto"
    seed: int = 0
    max_shard_size: int | str = "5GB"


@dataclass(frozen=True)
class WarmStart:
    """A request that has been checked; nothing is written yet.

    Attributes:
        config: of the new model.
        plans: its tensors; source: what there is of the source.
    """

    request: WarmStartRequest
    config: TTTE2EConfig
    plans: list[TensorPlan]
    source: SourceContents

    @property
    def parameters(self) -> int:
        """Of the new model, a tied head counted once."""
        return sum(prod(plan.shape) for plan in self.plans)

    @property
    def new_parameters(self) -> int:
        """Those that the source does not have."""
        return sum(prod(plan.shape) for plan in self.plans if plan.source is None)

    @property
    def total_bytes(self) -> int:
        """Of all weights on the disk."""
        return sum(self.bytes_of(plan) for plan in self.plans)

    def dtype_of(self, plan: TensorPlan) -> torch.dtype:
        """In which a tensor is written; a new one like the embeddings."""
        return DTYPES[self.request.dtype] or self.source.weights.dtypes[plan.source or EMBEDDINGS]

    def bytes_of(self, plan: TensorPlan) -> int:
        """Of one tensor on the disk."""
        return prod(plan.shape) * self.dtype_of(plan).itemsize

    def shards(self) -> StateDictSplit:
        """Which file holds which tensors.

        Raises:
            ValueError: `max_shard_size` is no size.
        """
        return split_into_shards({plan.name: self.bytes_of(plan) for plan in self.plans}, self.request.max_shard_size)


def prepare_warm_start(request: WarmStartRequest) -> WarmStart:
    """Check a request against its source, tensor by tensor, and the disk. A model on the Hub is downloaded.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ImportError: a package that reads the source is not installed.
        ValueError: the source cannot be converted, `settings` do not fit it, or `output` is not empty.
        OSError: a model of the Hub cannot be fetched, or the disk has no room.
    """
    dtype_named(request.dtype)
    request = replace(request, output=request.output.expanduser())
    check_output(request.output, resume=False)
    source = find_source(request.model, check_convertible)
    config = config_from_transformer(source.config, request.settings)
    contents = source.contents()
    if config.tie_word_embeddings and _has_own_head(contents.weights):
        config.tie_word_embeddings = False
    plans = plan_tensors(config, source.config.model_type, contents.weights.shapes)
    start = WarmStart(request, config, plans, contents)
    start.shards()
    check_disk_space(request.output, start.total_bytes, "the converted model")
    return start


def write_warm_start(start: WarmStart) -> None:
    """Write the new model with its configuration, generation configuration and tokenizer; whole or not at all.

    Raises:
        ValueError: the tokenizer would be another one when it is loaded beside the new model; a tensor has values that
            are not finite, in the source or in the new dtype.
        OSError: something cannot be written.
    """
    with folder_written_whole(start.request.output) as part:
        start.config.architectures = ["TTTE2EForCausalLM"]
        start.config.dtype = DTYPES[start.request.dtype] or start.source.weights.dtypes[EMBEDDINGS]
        start.config.save_pretrained(part)
        if start.source.generation is not None:
            (part / GENERATION).write_text(start.source.generation, encoding="utf-8")
        if start.source.tokenizer is not None:
            _write_tokenizer(start.source.tokenizer, part)
        plans, split = {plan.name: plan for plan in start.plans}, start.shards()
        names = chain.from_iterable(split.filename_to_tensors.values())
        write_shards(part, split, ((name, _tensor(start, plans[name])) for name in names))


def _has_own_head(weights: StoredWeights | LoadedWeights) -> bool:
    """Whether the files hold a head that differs from the embeddings, which transformers then does not tie to them."""
    if not {HEAD, EMBEDDINGS} <= weights.shapes.keys():
        return False
    return not torch.equal(weights.read(HEAD), weights.read(EMBEDDINGS))


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer beside the new config.json, which decides with it what class loads it."""
    tokenizer.save_pretrained(folder)
    loaded = load_tokenizer(folder)
    same = loaded.get_vocab() == tokenizer.get_vocab() and loaded.all_special_tokens == tokenizer.all_special_tokens
    if not same or any(loaded(text).input_ids != tokenizer(text).input_ids for text in PROBES):
        raise ValueError(
            f"tokenizer: saved beside the new model, the source's {type(tokenizer).__name__} is loaded as a different "
            f"{type(loaded).__name__}; take the tokenizer's files out of the source's folder, and name the tokenizer "
            "with --tokenizer later on"
        )


def _tensor(start: WarmStart, plan: TensorPlan) -> torch.Tensor:
    dtype = start.dtype_of(plan)
    if plan.source is None:
        return new_tensor(plan, start.config, dtype, start.request.seed)
    tensor = start.source.weights.read(plan.source).to(dtype).contiguous()
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{plan.source}: it has values that are not finite as {dtype}; the source is damaged, or needs a wider "
            "dtype"
        )
    return tensor
