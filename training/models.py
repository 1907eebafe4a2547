"""The model of a run: new from a preset, or a saved one to go on with, at another length if wanted.

Going on is a new run: the weights are loaded, the optimizer and its schedule begin afresh. What may differ from the
saved model is what no weight's shape depends on: the window, the RoPE base, and how the inner loop steps.
"""

import typing
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import RopeParameters

from ..configuration import load_config, load_preset, preset_names
from ..configuration.reading import check_field_names, merged
from ..data.tokenizer import separator_id

CHANGEABLE = (
    "rope_parameters max_position_embeddings sliding_window layer_types mini_batch_size inner_learning_rate "
    "inner_max_grad_norm meta_gradient meta_gradient_horizon inner_checkpoint_every inner_checkpoint_offload "
    "test_time_training"
).split()
SIZES = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_suffix_layers layer_types mixer_types"
).split()


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: what a recipe's patterns are compared with: the preset, also of a saved model that has its sizes; else
            the name of the file or folder.
        folder: a saved model (or its id on the Hub); None for a new one.
        config_class: of its configuration.
        fields: of its configuration, before a recipe's changes.
    """

    name: str
    folder: str | None
    config_class: type[PreTrainedConfig]
    fields: dict


def find_model(model: str) -> ModelSource:
    """A preset, a YAML file with the fields of a configuration, a folder with a saved model, or an id of the Hub.

    A folder that `ttt-e2e train` has written stands for the model in it.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: neither a preset nor a model that can be loaded; the message names the presets.
    """
    path = Path(model).expanduser()
    if model in preset_names():  # also where a folder of that name happens to be here
        return ModelSource(model, None, type(load_config(model)), load_preset(model))
    if path.is_dir():
        return _saved_model(path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise FileNotFoundError(f"model={model!r}: there is no such file")
        return ModelSource(path.stem, None, type(load_config(str(path))), load_preset(str(path)))
    if "/" not in model:
        load_preset(model)  # raises, with the names of those that there are
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model={model!r}: neither a folder nor a model of the Hub that can be loaded ({error}); presets are "
            f"{', '.join(preset_names())}"
        ) from error
    return ModelSource(path.name, model, type(config), config.to_dict())


def _saved_model(path: Path) -> ModelSource:
    if any((part / "adapter_config.json").is_file() for part in (path, path / "model")):
        raise ValueError(f"model={str(path)!r} is an adapter: merge it into its model first (ttt-e2e merge)")
    folder = next((folder for folder in (path, path / "model") if (folder / "config.json").is_file()), None)
    if folder is None:
        raise ValueError(
            f"model={str(path)!r}: no config.json in it or in its folder model; name a folder that save_pretrained "
            "or ttt-e2e train has written to its end"
        )
    config = AutoConfig.from_pretrained(folder)
    # Resolved, because an adapter remembers where its model is.
    return ModelSource(preset_of(config) or path.name, str(folder.resolve()), type(config), config.to_dict())


def preset_of(config: PreTrainedConfig) -> str | None:
    """The preset of the same sizes, whose numbers a recipe then takes; None where there is none."""
    for name in preset_names():
        preset = load_config(name)
        alike = (getattr(config, size, None) == getattr(preset, size, None) for size in SIZES)
        if preset.model_type == config.model_type and all(alike):
            return name
    return None


def changed_config(source: ModelSource, changes: dict, sequence_length: int) -> PreTrainedConfig:
    """The configuration of the model to train: the source's with a recipe's changes, for rows of a given length.

    Args:
        changes: fields of the configuration.
        sequence_length: tokens of context in a row; `max_position_embeddings` is never left below it.

    Raises:
        ValueError: a field does not exist, or would change the shape of a saved weight; a row has no whole mini-batch.
    """
    known = source.config_class().to_dict() | source.fields
    rope_fields = typing.get_type_hints(RopeParameters)
    check_field_names(changes.get("rope_parameters") or {}, rope_fields, source="model.rope_parameters")
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"model.{name}: a {source.config_class.__name__} has no such field; leave it out")
        if source.folder is not None and name not in CHANGEABLE and known[name] != value:
            raise ValueError(
                f"model.{name}={value!r}: the saved model has {known[name]!r}, and its weights depend on it; what may "
                f"change is {', '.join(CHANGEABLE)}"
            )
    longest = max(known.get("max_position_embeddings") or 0, sequence_length)
    fields = merged(source.fields | {"max_position_embeddings": longest}, changes)
    try:
        config = source.config_class.from_dict(fields)
    except StrictDataclassError as error:  # a value of another type
        raise ValueError(f"model: {' '.join(str(error).split())}; change it in the recipe or with --set") from error
    if getattr(config, "test_time_training", False) and sequence_length < config.mini_batch_size:
        raise ValueError(
            f"data.sequence_length={sequence_length} is shorter than a mini-batch (model.mini_batch_size="
            f"{config.mini_batch_size}), so that no inner step would ever be taken: make the rows longer or the "
            "mini-batch smaller"
        )
    return config


def fit_to_tokenizer(
    source: ModelSource, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, trained: bool
) -> PreTrainedConfig:
    """The configuration with a tokenizer's special tokens and, for a new model, its vocabulary.

    Args:
        trained: the tokenizer was trained for the configuration's vocabulary, which then holds.

    Raises:
        ValueError: the tokenizer has ids that a saved model does not know.
    """
    changes = {
        "bos_token_id": separator_id(tokenizer),  # targets equal to it are not predicted
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if source.folder is None and not trained:
        changes["vocab_size"] = len(tokenizer)
    elif len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"tokenizer: it has {len(tokenizer)} tokens, but the model only {config.vocab_size}; name the tokenizer "
            "that the model was trained with"
        )
    return type(config).from_dict(config.to_dict() | changes)


def build_model(source: ModelSource, config: PreTrainedConfig) -> PreTrainedModel:
    """The model to train, in float32: new with random weights, or the saved one under a changed configuration."""
    if source.folder is not None:
        return AutoModelForCausalLM.from_pretrained(source.folder, config=config, dtype=torch.float32)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
