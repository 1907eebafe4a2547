"""Where a model comes from: found by its name, and not loaded yet."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from ..configuration import load_config, load_preset, preset_names
from ..configuration.strict_yaml import is_path
from ..conversion.prime_weights import PRIME_CONFIG, PrimeWeights
from ..data.sources import path_or_id
from ..storage.record import MODEL, saved_folder

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

    @property
    def config(self) -> PreTrainedConfig:
        """Its configuration, a new object each time."""
        return self.config_class.from_dict(self.fields)


def find_model(model: str | Path) -> ModelSource:
    """A preset, a YAML file with the fields of a configuration, a folder with a saved model, or an id of the Hub.

    A folder that `ttt-e2e train` has written stands for the model in it. A `Path` is never taken for a preset.

    Raises:
        FileNotFoundError: there is no such file or folder, or no model in it.
        ValueError: neither a preset nor a model that can be loaded; the message names the presets.
    """
    if isinstance(model, str) and model in preset_names():  # also where a folder of that name happens to be here
        return ModelSource(model, None, type(load_config(model)), load_preset(model))
    path = path_or_id(model, "model")
    if path is not None and path.is_dir():
        return _saved_model(path)
    file = str(path or model)
    if path is not None or "/" not in model or is_path(file):
        fields = load_preset(file)  # raises, with the names of the presets, where it is no such file
        return ModelSource(Path(file).stem, None, type(load_config(file)), fields)
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model={model!r}: neither a folder nor a model of the Hub that can be loaded ({error}); presets are "
            f"{', '.join(preset_names())}"
        ) from error
    return ModelSource(file.rpartition("/")[2], file, type(config), config.to_dict())


def find_saved_model(model: str | Path) -> ModelSource:
    """As `find_model`, of a model that is saved.

    Raises:
        ValueError: it is not.
    """
    source = find_model(model)
    check_saved(source)
    return source


def check_saved(source: ModelSource) -> None:
    """Check that a model has weights.

    Raises:
        ValueError: it is a preset, or a YAML file.
    """
    if source.folder is None:
        raise ValueError(
            f"model={source.name!r} is a preset with random weights, and has no trained weights: train it (ttt-e2e "
            f"train --model {source.name} ...) and name its folder"
        )


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a saved model, sorted.

    Raises:
        ValueError: there are none.
    """
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if not files:
        raise ValueError(f"model={str(folder)!r}: there are no weights in it (*.safetensors); save the model again")
    return files


def model_label(model: str | Path) -> str:
    """What a reader calls a model: the last part of its name, of a run's model that of the run."""
    path = Path(model)
    return path.parent.name if path.name == MODEL and path.parent.name else path.name


def _saved_model(path: Path) -> ModelSource:
    if saved_folder(path, "adapter_config.json"):
        raise ValueError(f"model={str(path)!r} is an adapter: merge it into its model first (ttt-e2e merge)")
    folder = saved_folder(path, PRIME_CONFIG)
    if folder is not None:
        weights = PrimeWeights.from_pretrained(folder)
        config: PreTrainedConfig = weights.config
        return ModelSource(preset_of(config) or path.name, str(folder.resolve()), type(config), config.to_dict())
    folder = saved_folder(path)
    if folder is None:
        raise FileNotFoundError(
            f"model={str(path)!r}: no config.json in it or in its folder {MODEL}; name a folder that save_pretrained "
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
