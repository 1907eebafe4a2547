"""A model with its tokenizer, as reading and writing text needs them."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from .. import TTTE2EConfig, TTTE2EForCausalLM
from ..data.tokenizer import load_tokenizer
from ..loading import chosen_device, find_saved_model, in_fast_dtype, load_model, on_device
from ..storage.dtypes import dtype_named


@dataclass(frozen=True)
class TextModel:
    """A TTT-E2E model in evaluation mode and the tokenizer that it was trained with.

    Attributes:
        split_special_tokens: special tokens that a text spells out, such as `<|end|>`, are read as these letters.
    """

    model: TTTE2EForCausalLM
    tokenizer: PreTrainedTokenizerBase
    split_special_tokens: bool = True


def load_text_model(
    model: str, *, dtype: str = "auto", device: torch.device | str | None = None, split_special_tokens: bool = True
) -> TextModel:
    """Load a model and its tokenizer.

    Args:
        model: a folder with a saved model, the folder of a run of `ttt-e2e train`, or an id of the Hub.
        dtype: of the weights: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: as they were saved, but float32 on a
            CPU that has no instructions for bfloat16.
        device: as torch names it (default: CUDA where there is one).
        split_special_tokens: special tokens that a text spells out are read as these letters.

    Raises:
        FileNotFoundError: there is no such folder, or no model or tokenizer in it.
        ValueError: not a TTT-E2E model with trained weights, or one that cannot be loaded.
    """
    torch_dtype, device, source = dtype_named(dtype), chosen_device(device), find_saved_model(model)
    if not issubclass(source.config_class, TTTE2EConfig):
        raise ValueError(
            f"model={model!r} is a {source.config_class.model_type} model, which has no learned context; name a "
            "TTT-E2E model"
        )
    tokenizer = load_tokenizer(source.folder, source.fields["vocab_size"])
    return ready(load_model(source, dtype=torch_dtype), tokenizer, device, dtype, split_special_tokens)


def ready(
    model: TTTE2EForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str | None,
    dtype: str,
    split_special_tokens: bool = True,
) -> TextModel:
    """A model that was loaded, on a device and in evaluation mode, with its tokenizer.

    Args:
        device, dtype, split_special_tokens: as `load_text_model` takes them.
    """
    if dtype == "auto":
        model = in_fast_dtype(model, device)
    tokenizer.model_max_length = VERY_LARGE_INTEGER  # the model reads any length: no warning about it
    return TextModel(on_device(model, device).eval(), tokenizer, split_special_tokens)
