"""What `ttt-e2e demo` needs to know, in one YAML file."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.dataclasses import strict

from .experiments import Experiment, load_experiment
from .strict_yaml import build_strictly, read_mapping

DEMO_RECIPE = Path(__file__).with_name("demo.yaml")


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
        experiment: what is trained and compared; by its name, or the path of a YAML file.
        row: the row of it whose model reads and writes.
        generation: what it reads and writes.
    """

    experiment: str
    row: str
    generation: GenerationRecipe

    def compared(self) -> Experiment:
        """The experiment itself."""
        return load_experiment(self.experiment)


def load_demo_recipe(path: Path = DEMO_RECIPE) -> DemoRecipe:
    """Read and check a recipe file, the experiment that it names included.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a field is unknown, missing, of the wrong type, or contradicts another one.
    """
    recipe = build_strictly(DemoRecipe, read_mapping(path), source=str(path))
    experiment = recipe.compared()
    if recipe.row not in experiment.rows or not experiment.recipes:
        trained = ", ".join(experiment.rows) if experiment.recipes else "none"
        raise ValueError(f"{path}: row={recipe.row!r} is no trained row of {recipe.experiment!r}, which has: {trained}")
    generation = recipe.generation
    if generation.short_read_tokens >= generation.long_read_tokens:
        raise ValueError(
            f"{path}: short_read_tokens={generation.short_read_tokens} must be below "
            f"long_read_tokens={generation.long_read_tokens}"
        )
    return recipe
