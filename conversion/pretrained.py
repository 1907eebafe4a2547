"""A pretrained model by its name: the folder of one, a GGUF file or a folder with one, or an id of the Hub."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ..data.sources import path_or_id
from ..data.tokenizer import find_tokenizer
from .gguf_file import LoadedWeights, gguf_config, gguf_file, gguf_tokenizer, gguf_weights
from .weight_files import StoredWeights, stored_weights

GENERATION = "generation_config.json"
# What is fetched of a model on the Hub: weights, configuration, and every kind of tokenizer.
DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True)
class SourceContents:
    """Attributes:
    weights: its tensors, by name.
    generation: its generation configuration as JSON; tokenizer: its tokenizer; None where it has none.
    """

    weights: StoredWeights | LoadedWeights
    generation: str | None
    tokenizer: PreTrainedTokenizerBase | None


@dataclass(frozen=True)
class Source:
    """A pretrained model that was found, of which only the configuration has been read.

    Attributes:
        name: as it was asked for.
        config: its configuration.
        path: its folder; None for an id of the Hub.
        gguf: its GGUF file; None for one in safetensors.
    """

    name: str
    config: PreTrainedConfig
    path: Path | None
    gguf: Path | None

    def contents(self) -> SourceContents:
        """Its tensors and tokenizer. A model on the Hub is downloaded, and a GGUF file is dequantised in memory.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged.
            OSError: a model of the Hub cannot be fetched.
        """
        if self.gguf is not None:
            return SourceContents(*gguf_weights(self.gguf), gguf_tokenizer(self.gguf))
        folder = self.path or Path(snapshot_download(self.name, allow_patterns=DOWNLOADED))
        generation = folder / GENERATION
        text = generation.read_text(encoding="utf-8") if generation.is_file() else None
        return SourceContents(stored_weights(folder), text, find_tokenizer(folder))


def find_source(model: str, check: Callable[[Mapping], None]) -> Source:
    """A pretrained model by its name.

    Args:
        check: is given the fields of its config.json, and raises ValueError for a model that will not do.

    Raises:
        FileNotFoundError: there is no such folder, or no config.json in it.
        ImportError: the package `gguf` is needed and not installed.
        ValueError: its configuration cannot be read, or is refused.
        OSError: it cannot be fetched from the Hub.
    """
    path = path_or_id(model, "model")
    file = gguf_file(path)
    if file is not None:
        return Source(model, gguf_config(file), None, file)
    if path is not None and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"model={str(path)!r}: no config.json in it; name a folder that save_pretrained has written, or an id of "
            "the Hub"
        )
    check(PreTrainedConfig.get_config_dict(path or model)[0])
    try:
        return Source(model, AutoConfig.from_pretrained(path or model), path, None)
    except (StrictDataclassError, KeyError, TypeError) as error:
        raise ValueError(f"model={str(path or model)!r}: its config.json cannot be read ({error})") from error
