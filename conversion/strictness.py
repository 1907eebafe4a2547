"""What every layout is checked for: that no tensor and no setting is lost, on either side."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig, PreTrainedModel


def model_shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a model by name, in the order of its modules; a tied head is left out."""
    with torch.device("meta"):
        model = model_class(config)
    tied = model.all_tied_weights_keys if config.tie_word_embeddings else ()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def check_tensors(given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that tensors are those of a configuration, by their names and shapes.

    Raises:
        ValueError: naming the one that is missing, superfluous or of another shape.
    """
    missing, superfluous = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing:
        raise ValueError(f"The parameters lack {missing}.")
    if superfluous:
        raise ValueError(f"The parameters hold {superfluous}, which this configuration has no place for.")
    for name, shape in expected.items():
        if tuple(given[name]) != shape:
            raise ValueError(f"`{name}` has shape {tuple(given[name])}, but the configuration needs {shape}.")


def check_settings(*needed: tuple[str, object, str, bool]) -> None:
    """Check that an official model can hold a configuration.

    Args:
        needed: of each setting its name and value, what the official model needs, and whether the value is that.

    Raises:
        ValueError: naming the first setting that is not.
    """
    for name, value, need, holds in needed:
        if not holds:
            raise ValueError(f"`{name}` is {value}, but the official model needs {need}: it cannot hold this one.")
