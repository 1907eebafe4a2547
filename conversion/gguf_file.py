"""A GGUF file (of llama.cpp and its relatives) as a source: one quantised model with its tokenizer in one file.

transformers reads it; here its kind is checked first, and what is read becomes tensors by their names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

SUFFIX, MAGIC = ".gguf", b"GGUF"
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class LoadedWeights:
    """Tensors in memory, by name."""

    tensors: Mapping[str, torch.Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        return self.tensors[name]


def gguf_file(path: Path | None) -> Path | None:
    """The GGUF file that a path means: itself, or the only one of a folder without a config.json; else None.

    Raises:
        ValueError: such a folder has several.
    """
    if path is None or path.suffix.lower() == SUFFIX:
        return path
    found = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() and not (path / "config.json").is_file() else []
    if len(found) > 1:
        raise ValueError(f"model={str(path)!r}: {len(found)} {SUFFIX} files in it; name one of them")
    return found[0] if found else None


def gguf_config(file: Path) -> PreTrainedConfig:
    """The configuration of the model in a GGUF file.

    Raises:
        ImportError: the package `gguf` is not installed.
        ValueError: the file is damaged, or holds another architecture.
    """
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"model={str(file)!r} is no GGUF file, or damaged; fetch it again")
    if find_spec("gguf") is None:
        raise ImportError(f"model={str(file)!r} is read by the package gguf: pip install 'ttt-e2e[gguf]'")
    from gguf import GGUFReader

    try:
        field = GGUFReader(file).get_field("general.architecture")
        architecture = None if field is None else field.contents()
    except Exception as error:  # what the reader meets first of a damaged file
        raise ValueError(f"model={str(file)!r} is damaged ({error}); fetch it again") from error
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"model={str(file)!r} holds a model of architecture {architecture!r}; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)


def gguf_weights(file: Path) -> tuple[LoadedWeights, str]:
    """The dequantised tensors of a GGUF file, float32, and its generation configuration as JSON."""
    # transformers looks for the file under the first name, and dequantises the one of the second.
    dequantise = GgufConfig(gguf_file=file.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=dequantise, dtype=torch.float32
    )
    tied = set(model.all_tied_weights_keys)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return LoadedWeights(tensors), model.generation_config.to_json_string()


def gguf_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer in a GGUF file."""
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
