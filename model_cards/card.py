"""Write the README.md of a saved model: it holds no number that was not measured, chosen or counted."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from ..evaluation import Table
from ..storage.disk import write_text
from ..transformers_release import OLDEST_TRANSFORMERS

TEMPLATE = Path(__file__).with_name("template.md")
FAST_WEIGHT_BYTES, ID_BYTES = 4, 8  # fast weights are float32 at least; ids and positions are int64
# The sections that tell of the code and the architecture alone.
OF_THE_CODE = ("## Use", "## Limits")
LEARNS, DECODES, RECURS = "learns", "decodes", "recurs"


@dataclass(frozen=True)
class TrainingHistory:
    """How a model was trained.

    Attributes:
        text: a sentence.
        facts: chosen or measured, by their names.
        row_length: tokens of context in a row; None where it is not known.
    """

    text: str
    facts: Mapping[str, str] = field(default_factory=dict)
    row_length: int | None = None


@dataclass(frozen=True)
class ResultsSection:
    """What was measured of a model: a text, and tables that may show other models beside it."""

    text: str
    tables: Sequence[Table]


@dataclass(frozen=True)
class ModelCardContents:
    """What a card says.

    Attributes:
        name: its title.
        config: of the model.
        parameters: their number.
        dtype: of the saved weights.
        has_code: the folder holds the code of the model, which then needs no package.
        base: the folder holds new weights alone, of this model; None for a whole one.
        training: None where nothing is known.
        results: of evaluations; `eval_results` are the same numbers for the metadata.
        license: of the weights, an identifier of the Hub; None leaves it out.
    """

    name: str
    config: PreTrainedConfig
    parameters: int
    dtype: torch.dtype
    has_code: bool = False
    base: str | None = None
    training: TrainingHistory | None = None
    results: Sequence[ResultsSection] = ()
    eval_results: Sequence[EvalResult] = ()
    license: str | None = None


@dataclass(frozen=True)
class SequenceMemory:
    """What reading leaves behind of one sequence, in bytes.

    Attributes:
        fast_weights: its own copy of the inner weights.
        window: at most, of keys, values and pending tokens.
        per_token: of keys and values that never leave, in blocks with full attention.
    """

    fast_weights: int
    window: int
    per_token: int


def write_model_card(folder: Path, contents: ModelCardContents, needs: str = "config.json") -> Path:
    """Write `README.md` into a folder that holds a saved model.

    Args:
        folder: as given to `save_pretrained`.
        contents: what it says.
        needs: a file that such a folder has.

    Returns:
        The file's path.

    Raises:
        FileNotFoundError: the folder does not hold a saved model.
    """
    if not (folder / needs).is_file():
        raise FileNotFoundError(f"folder={folder}: holds no {needs}; save the model there first")
    path = folder / "README.md"
    write_text(path, f"{model_card(contents)}\n")
    return path


def refresh_model_card(path: Path, contents: ModelCardContents) -> None:
    """Bring the sections of a card that tell of the code and the architecture up to the present template.

    Args:
        path: of the card. What it says of training and results stays.
        contents: only the config, the dtype and `has_code` are looked at.
    """
    fresh = {section.partition("\n")[0]: section for section in _sections(f"{model_card(contents)}\n")}
    old = _sections(path.read_text(encoding="utf-8"))
    heads = [section.partition("\n")[0] for section in old]
    write_text(
        path, "".join(fresh[head] if head in OF_THE_CODE else section for head, section in zip(heads, old, strict=True))
    )


def _sections(card: str) -> list[str]:
    return re.split(r"^(?=## )", card, flags=re.MULTILINE)


def model_card(contents: ModelCardContents) -> ModelCard:
    """The card as huggingface_hub knows it: metadata and Markdown."""
    config, kind = contents.config, architecture_kind(contents.config)
    tags = [config.model_type.replace("_", "-"), *(["test-time-training"] if kind == LEARNS else [])]
    data = ModelCardData(
        library_name="transformers" if contents.base is None else "ttt-e2e",
        pipeline_tag="text-generation",
        tags=tags,
        license=contents.license,
        base_model=_published(contents.base),
        model_name=contents.name,
        eval_results=list(contents.eval_results) or None,
        ignore_metadata_errors=False,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        contents=contents,
        config=config,
        kind=kind,
        oldest_transformers=OLDEST_TRANSFORMERS.removesuffix(".0"),
        dtype=str(contents.dtype).removeprefix("torch."),
        memory=None if kind == RECURS else sequence_memory(config, contents.dtype),
        window=config.sliding_window if "sliding_attention" in attention_kinds(config) else None,
    )


def _published(base: str | None) -> str | None:
    """The id of a base on the Hub; a path of this machine is none."""
    return base if base is not None and base.count("/") == 1 and not Path(base).exists() else None


def attention_kinds(config: PreTrainedConfig) -> list[str]:
    """What mixes the tokens in each block, none for a model without attention; its windows mean nothing."""
    return list(config.layer_types) if getattr(config, "use_attention", True) else []


def architecture_kind(config: PreTrainedConfig) -> str:
    """`LEARNS` while it reads, `DECODES` as a plain decoder with attention, or `RECURS`: has another kind of state."""
    if config.model_type != "ttt_e2e":
        return RECURS
    return LEARNS if config.test_time_training else DECODES


def sequence_memory(config: PreTrainedConfig, dtype: torch.dtype) -> SequenceMemory:
    """The bytes that one sequence needs besides the model, from the configuration of a `ttt_e2e` model.

    Args:
        dtype: of the weights, in which keys, values and hidden states are kept as well.
    """
    learns = config.test_time_training
    suffix = config.num_suffix_layers if learns else 0
    width = config.prime_intermediate_size if config.use_prime_mlp else config.intermediate_size
    matrices = len(range(3)[config.inner_matrices])
    mini_batch = config.mini_batch_size if learns else 0
    column = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize  # a key and a value
    window = mini_batch * (config.hidden_size * dtype.itemsize + 2 * ID_BYTES)
    kinds = attention_kinds(config)
    for index, kind in enumerate(kinds):
        if kind == "sliding_attention":
            # The attention of the first suffix block comes before all inner weights, and is not run again.
            pending = mini_batch if index > config.num_hidden_layers - suffix else 0
            window += (config.num_sink_tokens + config.sliding_window - 1 + pending) * column
    return SequenceMemory(
        fast_weights=suffix * matrices * config.hidden_size * width * FAST_WEIGHT_BYTES,
        window=window,
        per_token=kinds.count("full_attention") * column,
    )
