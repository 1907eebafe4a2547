"""A folder for the Hub from a saved model: it works for someone who has never heard of this package.

It holds the weights (safetensors), configuration and generation settings, the tokenizer, a card, and the code that runs
the model, so that `from_pretrained(..., trust_remote_code=True)` needs nothing but transformers.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CHAT_TEMPLATE_FILE

from ..data.tokenizer import PLAIN_TEMPLATE, check_vocabulary, find_tokenizer, load_tokenizer
from ..loading import ModelSource, find_saved_model, load_saved, model_label, weight_files
from ..storage.disk import check_disk_space, folder_written_whole, read_json, write_text
from ..storage.dtypes import dtype_named
from ..storage.record import check_output
from .card import ModelCardContents, TrainingHistory, refresh_model_card, write_model_card
from .history import training_history
from .joined_code import joined_code, needed_files
from .measured import MeasuredResults, model_identities, read_results

PACKAGE = __package__.partition(".")[0]
DTYPES = ("float32", "bfloat16")
LONGEST_UNKNOWN = 8192  # rows of pre-training in the paper
ROOM_FOR_SMALL_FILES = 2**25  # tokenizer, code and card
# Where transformers keeps the classes with a head, by the Auto class that finds them.
TASKS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
}
# The end of the exported file of the model's classes: what `import ttt_e2e` does by itself.
LISTING = """

# Trainer's label smoothing and pipelines know those classes only that are listed here by name.
from transformers.models.auto import modeling_auto  # noqa: E402

"""
LISTED = 'modeling_auto.{mapping}_NAMES.setdefault("{model_type}", "{class_name}")\n'


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and where to.

    Attributes:
        model: a folder with a saved model and its tokenizer, or the folder of a run of `ttt-e2e train`.
        output: the Hub folder, new or empty.
        dtype: of the weights, "float32" or "bfloat16"; None as they were saved.
        results: folders that `ttt-e2e evaluate` has written, each "FOLDER" or "DATA=FOLDER", where DATA says what was
            read.
        name: title of the card; None for the folder's name.
        license: of the weights, an identifier of the Hub such as "apache-2.0"; None leaves it out of the card.
        base: of new weights alone, where others find the model below; None for the name that it had in training.
    """

    model: str
    output: Path
    dtype: str | None = None
    results: Sequence[str] = ()
    name: str | None = None
    license: str | None = None
    base: str | None = None


@dataclass(frozen=True)
class Export:
    """A request that has been checked.

    Attributes:
        folder: of the saved model.
        classes: the model's classes by the Auto class that finds them: "AutoConfig", "AutoModel",
            "AutoModelForCausalLM", and those with other heads that it has.
        dtype: of the exported weights.
    """

    request: ExportRequest
    folder: Path
    classes: dict[str, type]
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase
    results: list[MeasuredResults]


def prepare_export(request: ExportRequest) -> Export:
    """Check a request; nothing is written and no weight is read, except to recognise the model of given results.

    Raises:
        ValueError, OSError: the folder holds no model of this package with its tokenizer, the output is not empty or
            its disk too small, or results are of another model.
    """
    request = replace(request, output=request.output.expanduser())
    wanted = None if request.dtype is None else dtype_named(request.dtype, DTYPES)
    if request.base is not None:
        raise ValueError(
            f"base={request.base!r}: model={request.model!r} is a whole model, without a base; leave it out"
        )
    source = find_saved_model(Path(request.model))
    folder, classes = Path(source.folder), auto_classes(source)
    check_output(request.output, resume=False)
    tokenizer = padded_tokenizer(folder, source.fields["vocab_size"])
    check_generation_settings(folder)
    saved_dtype = getattr(torch, source.fields.get("dtype") or "float32")
    dtype = wanted or saved_dtype
    weights = sum(path.stat().st_size for path in weight_files(folder))
    needed = int(weights * max(1, dtype.itemsize / saved_dtype.itemsize)) + ROOM_FOR_SMALL_FILES
    check_disk_space(request.output, needed, "the exported model")
    results = results_of(request, folder, tokenizer, saved_dtype)
    return Export(request, folder, classes, dtype, tokenizer, results)


def results_of(
    request: ExportRequest, folder: Path, tokenizer: PreTrainedTokenizerBase, saved_dtype: torch.dtype
) -> list[MeasuredResults]:
    """The results of a request, whose weights are read only where there are some.

    Raises:
        ValueError, OSError: results are damaged, or of another model than the one in `folder`.
    """
    results = [read_results(text, saved_dtype) for text in request.results]
    if not results:
        return []
    identities = model_identities(folder, tokenizer)
    return [measured.of_model(identities, folder) for measured in results]


def write_export(export: Export) -> Path:
    """Write the Hub folder; it appears whole or not at all.

    Returns:
        The folder.

    Raises:
        ValueError: weights are missing or not finite.
        OSError: the folder cannot be written.
    """
    with folder_written_whole(export.request.output) as part:
        model = load_whole(export.folder, export.dtype)
        contents = card_contents(export, model)
        model.config.auto_map = auto_map(export.classes)
        model.config.max_position_embeddings = length_for_tools(model.config, contents.training)
        model.save_pretrained(part)
        export.tokenizer.save_pretrained(part)
        write_chat_template(part, export.tokenizer)
        write_code(part, export.classes)
        write_model_card(part, contents)
    return export.request.output


def length_for_tools(config: PreTrainedConfig, training: TrainingHistory | None) -> int:
    """`max_position_embeddings` of an exported model, which reads any length.

    Tools take it for the longest text: lm_eval with `--batch_size auto` reads 64 texts of this length to try them out,
    and cuts longer ones to it. It is the length in training, as with other models; where that is not known, at most
    `LONGEST_UNKNOWN`.
    """
    known = config.max_position_embeddings
    if any(rope.get("rope_type") == "yarn" for rope in config.rope_of_layer_types().values()):
        return known  # its angles follow from it
    if training is not None and training.row_length is not None:
        return training.row_length
    return min(known, LONGEST_UNKNOWN)


def auto_classes(source: ModelSource) -> dict[str, type]:
    """The classes of a model by the Auto class that finds them.

    Raises:
        ValueError: the model is not one of this package.
    """
    config_class = source.config_class
    language_model = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
    if language_model is None or language_model.__module__.partition(".")[0] != PACKAGE:
        raise ValueError(
            f"model={source.folder!r} is a {config_class.model_type!r} model, which is not one of this package; upload "
            "it with its own library (`push_to_hub` of transformers)"
        )
    found = {name: getattr(transformers, mapping).get(config_class, None) for name, mapping in TASKS.items()}
    return {
        "AutoConfig": config_class,
        "AutoModel": MODEL_MAPPING[config_class],
        **{name: cls for name, cls in found.items() if cls is not None},
    }


def auto_map(classes: dict[str, type]) -> dict[str, str]:
    """The entries of config.json by which transformers finds the classes in the files beside it."""
    return {name: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for name, cls in classes.items()}


def code_files(classes: dict[str, type]) -> tuple[Path, Path]:
    """The source files of the configuration's class and of the models' classes."""
    configuration, modeling = (sys.modules[classes[name].__module__].__file__ for name in ("AutoConfig", "AutoModel"))
    return Path(str(configuration)), Path(str(modeling))


def write_code(folder: Path, classes: dict[str, type]) -> None:
    """Write the code that the classes need; the file of the models lists them with transformers."""
    configuration, modeling = code_files(classes)
    joined = joined_code(configuration, modeling)
    for path in needed_files([configuration, modeling]):  # earlier exports copied each
        (folder / path.name).unlink(missing_ok=True)
    for name, text in joined.items():
        write_text(folder / name, text)
    model_type = classes["AutoConfig"].model_type
    with (folder / modeling.name).open("a", encoding="utf-8") as file:
        file.write(LISTING)
        for name in sorted(classes.keys() & TASKS.keys()):
            listed = {"mapping": TASKS[name], "model_type": model_type, "class_name": classes[name].__name__}
            file.write(LISTED.format(**listed))


def write_chat_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the plain chat template beside a tokenizer that has none, so that messages are the same text everywhere."""
    if tokenizer.chat_template is None:
        (folder / CHAT_TEMPLATE_FILE).write_text(PLAIN_TEMPLATE, encoding="utf-8")


def refresh_export(folder: str | Path) -> None:
    """Bring what an exported folder repeats of the package up to date: code, auto_map, template, sections of the card.

    Raises:
        ValueError: there is no whole model of this package in it.
    """
    folder, source = Path(folder), find_saved_model(Path(folder))
    classes, settings = auto_classes(source), folder / "config.json"
    write_code(folder, classes)
    write_chat_template(folder, load_tokenizer(folder))
    config = read_json(settings, "save the model again") | {"auto_map": auto_map(classes)}
    write_text(settings, json.dumps(config, indent=2, sort_keys=True) + "\n")
    model_config = classes["AutoConfig"].from_pretrained(folder)
    contents = ModelCardContents(folder.name, model_config, parameters=0, dtype=model_config.dtype, has_code=True)
    refresh_model_card(folder / "README.md", contents)


def padded_tokenizer(folder: Path, vocabulary_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, padding on the left, where a language model that writes needs it.

    Raises:
        ValueError: there is none, or it has ids that the model does not know.
    """
    tokenizer = find_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(
            f"model={str(folder)!r}: there is no tokenizer in it, and without one nobody can use the model; save it "
            "there with tokenizer.save_pretrained"
        )
    check_vocabulary(tokenizer, vocabulary_size)
    tokenizer.padding_side = "left"
    return tokenizer


def check_generation_settings(folder: Path) -> None:
    """Check that transformers will save the generation settings of a model again.

    Raises:
        ValueError: they contradict themselves.
    """
    if (folder / "generation_config.json").is_file():
        try:
            GenerationConfig.from_pretrained(folder).validate(strict=True)
        except ValueError as error:
            raise ValueError(f"{folder / 'generation_config.json'}: repair it first ({error})") from error


def load_whole(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder.

    Raises:
        ValueError: a weight is missing, is not finite, or belongs to another class.
    """
    model, unexpected = load_saved(folder, dtype=dtype)
    if unexpected:
        raise ValueError(
            f"model={str(folder)!r}: {unexpected[0]} among its weights is not of a {type(model).__name__} and would be "
            "lost; export the language model, and save this one with save_pretrained"
        )
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise ValueError(f"model={str(folder)!r}: {name} has values that are not finite; export another checkpoint")
    return model


def card_contents(export: Export, model: PreTrainedModel) -> ModelCardContents:
    """What the card says about an exported model."""
    request = export.request
    return ModelCardContents(
        name=request.name or model_label(export.folder),
        config=model.config,
        parameters=model.num_parameters(),
        dtype=export.dtype,
        has_code=True,
        training=training_history(export.folder, model.config),
        results=[measured.section(export.dtype) for measured in export.results],
        eval_results=[entry for measured in export.results for entry in measured.entries()],
        license=request.license,
    )
