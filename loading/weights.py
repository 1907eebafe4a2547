"""Models from where they were found: weights, their dtype, and their device."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..conversion.prime_weights import PRIME_CONFIG, PrimeWeights
from .sources import ModelSource

logger = logging.get_logger(__name__)


def chosen_device(name: torch.device | str | None) -> torch.device:
    """The device of a name, tried out; CUDA, where there is one, for None.

    Raises:
        ValueError: it cannot be used.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={str(name)!r} cannot be used ({reason}); name another one, as cpu") from error


def on_device(model: PreTrainedModel, name: torch.device | str | None) -> PreTrainedModel:
    """Move a model to a device, and say so where its dtype is slow there.

    Args:
        name: as `chosen_device` takes it.
    """
    device = chosen_device(name)
    if is_slow(model.dtype, device):
        logger.warning_once(
            "This CPU has no instructions for bfloat16, in which the model was saved: --dtype float32 is several times "
            "as fast (a learned context belongs to one dtype)."
        )
    return model.to(device)  # type: ignore[arg-type]  # a wrapped method


def in_fast_dtype(model: PreTrainedModel, name: torch.device | str | None) -> PreTrainedModel:
    """The model, in float32 where it is in bfloat16 and the CPU has no instructions for that; says so.

    Args:
        name: of the device, as `chosen_device` takes it.
    """
    if is_slow(model.dtype, chosen_device(name)):
        logger.warning_once(
            "This CPU has no instructions for bfloat16, in which the model was saved: it reads in float32, many times "
            "as fast (a learned context belongs to one dtype: --dtype bfloat16 for one that was made so)."
        )
        return model.float()
    return model


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device is a CPU without instructions for the dtype."""
    return device.type == "cpu" and dtype == torch.bfloat16 and not multiplies_bfloat16()


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; True where that is not known."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return known.get("architecture") != "x86_64" or known.get("avx512_bf16", False) or known.get("amx_bf16", False)


def load_model(
    source: ModelSource, config: PreTrainedConfig | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The causal language model of a source, on the CPU.

    Args:
        config: instead of the source's own.
        dtype: of the weights (default: as they were saved; float32 for random ones).

    Raises:
        ValueError: its files cannot be read, or a weight is missing.
    """
    if source.folder is None:
        return AutoModelForCausalLM.from_config(config or source.config, dtype=dtype or torch.float32)
    return load_saved(source.folder, config, dtype)[0]


def load_saved(
    folder: str | Path, config: PreTrainedConfig | None = None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """As `load_model`, from a folder or an id of the Hub.

    Returns:
        The model, and names of saved weights that it has no place for.
    """
    if (Path(folder) / PRIME_CONFIG).is_file():
        return PrimeWeights.from_pretrained(folder).on_base(config=config, dtype=dtype), []  # type: ignore[arg-type]  # found with them
    arguments = {"dtype": dtype or "auto"} | ({} if config is None else {"config": config})
    try:
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model={str(folder)!r} cannot be loaded ({error}); train or save it again") from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would make them up
        raise ValueError(
            f"model={str(folder)!r}: {missing[0]} is missing from its weights; train or save the model again"
        )
    return model, sorted(report["unexpected_keys"])
