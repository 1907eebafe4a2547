"""A model with its tokenizer, as reading and writing text needs them."""

from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from .. import TTTE2EConfig, TTTE2EForCausalLM
from ..data.tokenizer import load_tokenizer
from ..training.models import find_model

DTYPES = ("auto", "float32", "bfloat16", "float16")


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
    model: str, *, dtype: str = "auto", device: str | None = None, split_special_tokens: bool = True
) -> TextModel:
    """Load a model and its tokenizer.

    Args:
        model: a folder with a saved model, the folder of a run of `ttt-e2e train`, or an id of the Hub.
        dtype: of the weights: `"auto"` (as they were saved), `"float32"`, `"bfloat16"` or `"float16"`.
        device: as torch names it (default: CUDA where there is one).
        split_special_tokens: special tokens that a text spells out are read as these letters.

    Raises:
        FileNotFoundError: there is no such folder, or no tokenizer in it.
        ValueError: not a TTT-E2E model with trained weights, or one that cannot be loaded.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    device = _device(device)
    source = find_model(model)
    if source.folder is None:
        raise ValueError(
            f"model={model!r} has no trained weights: train it (ttt-e2e train --model {model} ...) and name its folder"
        )
    if not issubclass(source.config_class, TTTE2EConfig):
        raise ValueError(
            f"model={model!r} is a {source.config_class.model_type} model, which has no learned context; name a "
            "TTT-E2E model"
        )
    tokenizer = load_tokenizer(source.folder)
    if len(tokenizer) > source.fields["vocab_size"]:
        raise ValueError(
            f"model={model!r}: its tokenizer has {len(tokenizer)} tokens, but the model only "
            f"{source.fields['vocab_size']}; put the tokenizer that it was trained with into the folder"
        )
    tokenizer.model_max_length = VERY_LARGE_INTEGER  # the model reads any length: no warning about it
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model={model!r} cannot be loaded ({error}); train or save it again") from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would make them up
        raise ValueError(f"model={model!r}: {missing[0]} is missing from its weights; train or save it again")
    return TextModel(loaded.to(device).eval(), tokenizer, split_special_tokens)


def _device(name: str | None) -> torch.device:
    """The device, tried out."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name!r} cannot be used ({reason}); name another one, as cpu") from error
