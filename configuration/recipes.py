"""Training recipes: how a model is trained, in one YAML file per recipe.

A recipe file holds the numbers of its smallest model and, under `by_model`, what differs for others: glob patterns of
model names, applied in their order. Overrides from a command line come last.
"""

import dataclasses
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub.dataclasses import strict
from transformers import TrainingArguments

from .. import TTTE2EConfig
from .strict_yaml import (
    build_strictly,
    check_field_names,
    check_field_types,
    file_names,
    first_comment,
    merged,
    named_file,
    parse_yaml,
    read_with_bases,
)

RECIPE_FOLDER = Path(__file__).with_name("recipes")
MODEL_FIELDS = {field.name: field.type for field in dataclasses.fields(TTTE2EConfig)}
# What `MetaTrainingArguments` has beyond the fields of transformers.
OWN_TRAINING_TYPES = {
    "inner_lr_init": float,
    "inner_lr_warmup_steps": float,
    "optimizer": str,
    "muon_learning_rate": float | None,
    "muon_excludes": list[str],
}
TRAINING_FIELDS = (*(field.name for field in dataclasses.fields(TrainingArguments)), *OWN_TRAINING_TYPES)
HEAD_FIELDS = ("batch_size", "starts_from_saved")
MANAGED_FIELDS = {
    "gradient_accumulation_steps": "it follows from batch_size, per_device_train_batch_size and the number of "
    "processes; set batch_size",
    "auto_find_batch_size": "it would change the batch size unseen; lower per_device_train_batch_size instead",
    "output_dir": "give the folder when you start the run",
    "resume_from_checkpoint": "say that when you start the run",
    "gradient_checkpointing": "use activation_checkpointing, its present name",
    "gradient_checkpointing_kwargs": "use activation_checkpointing_kwargs, its present name",
}


@strict
@dataclass
class DataRecipe:
    """How documents become rows of tokens.

    Attributes:
        sequence_length: tokens of context in a row, T; a row holds T + 1, the last one only as a target.
        one_document_per_row: a row never holds parts of two documents; otherwise they are laid end to end and cut.
        streaming: read the documents while training instead of preparing all of them first.
        text_column: the column with the documents.
        split_special_tokens: a document that spells out a special token, such as `<|end|>`, means these letters; false
            reads it as that token.
        split: the part of a data set of the Hub that is used.
        configuration: its configuration, where it has several.
        validation_split: the part of a data set of the Hub that is named as validation data.
        validation_every: each n-th document is kept for validation; None: none is.
        training_only: folders whose documents are never kept for validation, for example because they hold near-copies
            of one another.
        whole_folders: a folder's documents are all for training or all for validation; `validation_every` counts
            folders then.
        tuning: keep back as many further documents of the training ones, and validate on these: what is chosen by them
            is not chosen by those that are measured in the end.
        needle_share: share of the training rows that hide a fact and ask for it at their end (`data.needle_rows`).
        validation_rows: at most so many rows for validation; None: all.
    """

    sequence_length: int
    one_document_per_row: bool = False
    streaming: bool = False
    text_column: str = "text"
    split_special_tokens: bool = True
    split: str = "train"
    configuration: str | None = None
    validation_split: str = "train"
    validation_every: int | None = None
    training_only: list[str] = dataclasses.field(default_factory=list)
    whole_folders: bool = False
    tuning: bool = False
    needle_share: float = 0.0
    validation_rows: int | None = None


@strict
@dataclass
class Recipe:
    """How one model is trained.

    Attributes:
        name: of the file.
        description: first comment line of the file.
        batch_size: sequences per outer step, over all processes and accumulation steps.
        model: fields of `TTTE2EConfig` that the recipe changes.
        data: how documents become rows.
        starts_from_saved: the recipe goes on with a saved model; it makes no sense for random weights.
        training: fields of the training arguments: those of `transformers.TrainingArguments`, and of
            `MetaTrainingArguments` beyond them.
    """

    name: str
    description: str
    batch_size: int
    model: dict
    data: DataRecipe
    training: dict
    starts_from_saved: bool = False

    def rows_at_once(self, processes: int) -> int:
        """Rows that each of several processes reads side by side: `per_device_train_batch_size` (1 where the recipe
        does not say), or its whole share of the batch where that is less.

        Raises:
            ValueError: the batch cannot be spread evenly.
        """
        rows, rest = divmod(self.batch_size, processes)
        at_once = min(self.training.get("per_device_train_batch_size", 1), max(rows, 1))
        if rest or rows % at_once:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be spread over {processes} processes in steps of "
                f"training.per_device_train_batch_size={at_once} rows: make it a multiple of {processes * at_once}"
            )
        return at_once


def recipe_names() -> list[str]:
    """Names that `load_recipe` knows, sorted."""
    return file_names(RECIPE_FOLDER)


def recipe_description(name: str) -> str:
    """First comment line of a recipe's file: what it is for."""
    return first_comment(named_file(name, RECIPE_FOLDER, "recipe"))


def load_recipe(
    name_or_path: str,
    model_name: str,
    overrides: Sequence[str] = (),
    training_fields: Collection[str] | None = None,
) -> Recipe:
    """Read a recipe, as it is for one model.

    Args:
        name_or_path: a name out of `recipe_names()`, or the path of a YAML file.
        model_name: compared with the patterns of `by_model`, for example "350m-full-attention". A model that no
            pattern names gets the numbers outside of `by_model`.
        overrides: for example "training.learning_rate=1e-3" or "batch_size=8"; values are YAML. Applied last. A
            mapping is merged into the one that is there.
        training_fields: names allowed in `training` (default: the fields of `MetaTrainingArguments`).

    Raises:
        ValueError: no such recipe; a field that is unknown, missing, set elsewhere or of the wrong type; a number out
            of range; an override that cannot be read. The message names the right field or the remedy.
    """
    path = named_file(name_or_path, RECIPE_FOLDER, "recipe")
    training_fields = TRAINING_FIELDS if training_fields is None else training_fields
    fields: dict = {}
    for file, own in read_with_bases(path, RECIPE_FOLDER, "recipe"):
        by_model = own.pop("by_model", None) or {}
        _check_sections(own, training_fields, source=str(file))
        fields = merged(fields, own)
        if not isinstance(by_model, Mapping):
            raise ValueError(f"{file}: by_model must hold a mapping of patterns to fields, but holds {by_model!r}")
        for pattern, changes in by_model.items():
            # Also those of other models, so that a mistake shows at once.
            _check_sections(changes, training_fields, source=f"{file}, by_model {pattern!r}")
            if fnmatchcase(model_name, str(pattern)):
                fields = merged(fields, changes)
    for override in overrides:
        fields = merged(fields, _parse_override(override, training_fields))
    heading = {"name": path.stem, "description": first_comment(path), "model": {}, "training": {}}
    recipe = build_strictly(Recipe, heading | fields, source=str(path))
    _check_values(recipe, source=str(path))
    return recipe


def _check_sections(fields: object, training_fields: Collection[str], source: str) -> None:
    """Check the names of all fields; which ones are required is decided when everything is merged."""
    sections = _section_fields(training_fields)
    if not isinstance(fields, Mapping):
        raise ValueError(f"{source} must hold a mapping of fields to values, but holds {fields!r}")
    check_field_names(fields, [*HEAD_FIELDS, *sections], source=source)
    for section, known in sections.items():
        inside = f"{source}, section {section}"
        values = fields.get(section, {})
        if not isinstance(values, Mapping):
            raise ValueError(f"{inside} must hold a mapping of fields to values, but holds {values!r}")
        if section == "training":
            _refuse_managed(values, source=inside)
        check_field_names(values, known, source=inside)


def _section_fields(training_fields: Collection[str]) -> dict[str, Collection[str]]:
    data_fields = [field.name for field in dataclasses.fields(DataRecipe)]
    return {"model": MODEL_FIELDS, "data": data_fields, "training": training_fields}


def _refuse_managed(training: Collection[str], source: str) -> None:
    for field in training:
        if field in MANAGED_FIELDS:
            raise ValueError(f"{source}: {field} cannot be set in a recipe: {MANAGED_FIELDS[field]}")


def _parse_override(override: str, training_fields: Collection[str]) -> dict:
    """ "training.learning_rate=1e-3" -> {"training": {"learning_rate": 0.001}}."""
    source = f"override {override!r}"
    key, equals, text = (part.strip() for part in override.partition("="))
    if not (key and equals and text):
        raise ValueError(f"{source} must be FIELD=VALUE, as in training.learning_rate=1e-3 (null for no value)")
    parts = key.split(".")
    if parts[0] == "training":
        _refuse_managed(parts[1:2], source=source)
    sections = _section_fields(training_fields)
    known = [*HEAD_FIELDS, *(f"{section}.{field}" for section, names in sections.items() for field in names)]
    check_field_names([".".join(parts[:2])], known, source=source)
    value = parse_yaml(text, source=source)
    for part in reversed(parts):
        value = {part: value}
    return value


def _check_values(recipe: Recipe, source: str) -> None:
    training_types = typing.get_type_hints(TrainingArguments) | OWN_TRAINING_TYPES
    check_field_types(recipe.training, training_types, source=f"{source}, section training")
    check_field_types(recipe.model, MODEL_FIELDS, source=f"{source}, section model")
    if not 0 <= recipe.data.needle_share <= 1:
        raise ValueError(f"{source}: data.needle_share={recipe.data.needle_share} must be between 0 and 1")
    at_least = {"batch_size": (recipe.batch_size, 1), "data.sequence_length": (recipe.data.sequence_length, 1)}
    at_least["data.validation_every"] = (recipe.data.validation_every, 2)
    at_least["data.validation_rows"] = (recipe.data.validation_rows, 1)
    rows = recipe.training.get("per_device_train_batch_size")
    at_least["training.per_device_train_batch_size"] = (rows, 1)
    if recipe.training.get("max_steps") != -1:  # which stands for epochs
        at_least["training.max_steps"] = (recipe.training.get("max_steps"), 1)
    for field, (value, least) in at_least.items():
        if value is not None and value < least:
            raise ValueError(f"{source}: {field}={value} must be at least {least}")
    try:
        recipe.rows_at_once(processes=1)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
