"""The recipe of `ttt-e2e demo`: data, model presets, training and evaluation, read from one YAML file."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.dataclasses import strict
from transformers import TrainingArguments

from .presets import load_preset
from .strict_yaml import build_strictly, check_field_names, read_mapping

DEMO_RECIPE = Path(__file__).with_name("demo.yaml")


@strict
@dataclass
class DemoDataRecipe:
    """How documents become rows of tokens.

    Attributes:
        training_length: tokens of context in a training row (a row holds one more, the last target).
        validation_every: each n-th document, in order of size, is kept for validation.
        training_only: folders whose files never go to validation, because they hold near-copies of one another.
    """

    training_length: int
    validation_every: int
    training_only: list[str]


@strict
@dataclass
class EvaluationRecipe:
    """How loss by token position is measured.

    Attributes:
        length: tokens read of each validation document.
        documents: how many documents (the first ones, in order of their path, that are long enough).
        batch_size: documents read side by side.
        bucket_edges: positions at which the buckets of the table begin; the last one ends at `length`.
    """

    length: int
    documents: int
    batch_size: int
    bucket_edges: list[int]


@strict
@dataclass
class GenerationRecipe:
    """What is read and written at the end.

    Attributes:
        prompt_tokens: tokens of a validation document before the continuation by the text-generation pipeline.
        new_tokens: tokens written in each continuation.
        short_read_tokens: tokens after which the size of the learned context is taken the first time.
        long_read_tokens: tokens read in all, after which it is taken again, saved and loaded.
        read_step: tokens given to the model in one call.
    """

    prompt_tokens: int
    new_tokens: int
    short_read_tokens: int
    long_read_tokens: int
    read_step: int


@strict
@dataclass
class DemoRecipe:
    """Everything that `ttt-e2e demo` needs to know.

    Attributes:
        seed: of the weights and of the order of the data.
        test_time_training: model preset of the TTT-E2E model; its `vocab_size` is also the tokenizer's.
        baselines: shown name of each baseline, with its model preset; of the same `vocab_size`.
        training: fields of `transformers.TrainingArguments`, the same for all models.
    """

    seed: int
    test_time_training: str
    baselines: dict[str, str]
    data: DemoDataRecipe
    training: dict
    evaluation: EvaluationRecipe
    generation: GenerationRecipe


def load_demo_recipe(path: Path = DEMO_RECIPE) -> DemoRecipe:
    """Read and check a recipe file, the presets that it names included.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a field is unknown, missing, of the wrong type, or contradicts another one.
    """
    recipe = build_strictly(DemoRecipe, read_mapping(path), source=str(path))
    _check_training(recipe.training, source=f"{path}, section training")
    _check_presets(recipe, source=str(path))
    _check_lengths(recipe, source=str(path))
    return recipe


def _check_training(training: dict, source: str) -> None:
    """Names only: the values are checked by TrainingArguments itself, which needs torch's devices to do so."""
    check_field_names(training, [field.name for field in dataclasses.fields(TrainingArguments)], source=source)


def _check_presets(recipe: DemoRecipe, source: str) -> None:
    vocabulary_size = load_preset(recipe.test_time_training)["vocab_size"]
    for preset in recipe.baselines.values():
        if load_preset(preset)["vocab_size"] != vocabulary_size:
            raise ValueError(
                f"{source}: preset {preset!r} has vocab_size={load_preset(preset)['vocab_size']}, but "
                f"{recipe.test_time_training!r} has {vocabulary_size}; make them equal, for one tokenizer serves all"
            )


def _check_lengths(recipe: DemoRecipe, source: str) -> None:
    evaluation, generation = recipe.evaluation, recipe.generation
    if evaluation.bucket_edges != sorted(set(evaluation.bucket_edges)) or evaluation.bucket_edges[0] != 0:
        raise ValueError(f"{source}: bucket_edges={evaluation.bucket_edges} must begin with 0 and increase")
    if evaluation.bucket_edges[-1] >= evaluation.length:
        raise ValueError(
            f"{source}: bucket_edges={evaluation.bucket_edges} must all be below length={evaluation.length}"
        )
    if generation.short_read_tokens >= generation.long_read_tokens:
        raise ValueError(
            f"{source}: short_read_tokens={generation.short_read_tokens} must be below "
            f"long_read_tokens={generation.long_read_tokens}"
        )
