"""The small checkpoint of the official checkpointer in `tests/golden`, and what it takes to convert it."""

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ttt_e2e.conversion.official_checkpoint import convert_official

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT = GOLDEN / "official_orbax_tiny"
REFERENCE = GOLDEN / "micro_adamw_steps.safetensors"  # of the same weights
VOCABULARY = 61
METADATA = "0/model_weights/_METADATA"


def official_groups() -> dict[str, dict]:
    """The official configuration of the checkpoint."""
    return json.loads((GOLDEN / "micro_adamw_steps.json").read_text())["config"]


def official_file(folder: Path, **model) -> str:
    """Path of a config.json with the checkpoint's configuration, fields of its group `model` changed."""
    groups = official_groups()
    groups["model"] |= model
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(groups))
    return str(folder / "config.json")


def converted(folder: Path, **arguments) -> Path:
    """The checkpoint, converted into `folder / "model"`."""
    convert_official(str(CHECKPOINT), official_file(folder), folder / "model", **arguments)
    return folder / "model"


def changed_tree(folder: Path, change) -> Path:
    """A copy of the checkpoint after `change` of its dict of leaves."""
    copy = Path(shutil.copytree(CHECKPOINT, folder / "changed"))
    metadata = json.loads((copy / METADATA).read_text())
    change(metadata["tree_metadata"])
    (copy / METADATA).write_text(json.dumps(metadata))
    return copy


def words_tokenizer(words: int, bos: int = 1) -> PreTrainedTokenizerFast:
    """A tokenizer of so many words, the ids from 0 on."""
    vocabulary = {f"w{index}": index for index in range(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "w0", "pad_token": "w0", "bos_token": f"w{bos}", "eos_token": "w2"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)
