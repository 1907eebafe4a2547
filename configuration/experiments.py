"""Experiments: what is trained, what is measured, and what the paper found, in one YAML file each.

`NAME.yaml` is the toy twin, for two CPU cores; `NAME-full.yaml` beside it has the paper's sizes. What several of them
share is said once, in a file whose name begins with an underscore and which they name as their `base`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub.dataclasses import strict

from .presets import system_preset
from .recipes import recipe_names
from .strict_yaml import build_strictly, file_names, first_comment, merged, named_file, read_with_bases

EXPERIMENT_FOLDER = Path(__file__).with_name("experiments")
LOSS_TASKS = ("loss-by-position", "context-length")  # of `ttt-e2e evaluate`: those that are made of losses alone


@strict
@dataclass
class Trained:
    """One row of an experiment: a system, and how it differs from its preset and recipe.

    Attributes:
        system: a name of the registry of systems.
        model: fields of the configuration that differ.
        overrides: of the first recipe, as on a command line, for example "training.learning_rate=1e-3".
        of: the row whose trained model is evaluated; empty for one of its own.
        evaluation: arguments of the model's forward in evaluation, over those of the system.
        seeds: trainings, with the seeds 0, 1 and so on.
    """

    system: str
    model: dict = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    of: str = ""
    evaluation: dict = field(default_factory=dict)
    seeds: int = 1


@strict
@dataclass
class Measured:
    """What is measured of every row.

    Attributes:
        task: a task of `ttt-e2e evaluate`.
        lengths: tokens of context, one point each.
        documents: validation documents per point.
        settings: further settings of the task.
        judge: for the task that has one, the row that scores what the others write, or a model of the Hub.
    """

    task: str
    lengths: list[int]
    documents: int
    settings: dict = field(default_factory=dict)
    judge: str = ""


@strict
@dataclass
class Number:
    """One measured number.

    Attributes:
        row: of which row; length: at which length; name: under which name.
        first, end: of a list of numbers, the mean of those from `first` up to `end`.
    """

    row: str
    length: int
    name: str
    first: int = 0
    end: int = 0


@strict
@dataclass
class Claim:
    """What the paper found, as a comparison of two numbers.

    Attributes:
        text: in words.
        smaller, larger: the number that is smaller in the paper, and the larger one.
        about_context: it says what context far beyond the window is worth.
    """

    text: str
    smaller: Number
    larger: Number
    about_context: bool = False


@strict
@dataclass
class Yardsticks:
    """What stands beside every loss, so that a reader can tell whether the systems are trained.

    Attributes:
        n_grams: orders of the n-gram models of the training text; the first one tells what is trained.
        static_twin: the row of TTT-E2E's architecture, trained and measured without an inner loop.
        learning_off: the row of the meta-trained model, measured without one. As long as it is better than the twin,
            the outer training is not done.
        full_context, limited_context: rows of full attention and of its window-limited twin. Where the first is not
            better, the data shows nothing about context.
    """

    n_grams: list[int]
    static_twin: str
    learning_off: str
    full_context: str
    limited_context: str


@strict
@dataclass
class Experiment:
    """A toy twin, or the full-size one, of an experiment of the paper.

    Attributes:
        name: of the file.
        description: first comment line of the file.
        paper: what the paper found, with its numbers.
        size: of the presets.
        recipes: one after the other: the first from random weights, each further one from the model before. None at
            all leaves the weights random, which is enough to measure time.
        recipes_of: by system, other recipes in place of these.
        data: as `ttt-e2e train --data` takes it; validation_every: each n-th document is kept for the measurements;
            tokenizer: a folder or an id of the Hub; empty for one that is trained on the data;
            training_only: folders whose documents never are, because they hold near-copies of one another;
            whole_folders: a folder's documents stay on one side.
        overrides: of the first recipe, for all rows, as on a command line; those of a row come last.
        by_recipe: by recipe and then by system, overrides that suit the system. Those of recipes that the experiment
            has not, which its base may have, say nothing.
        yardsticks: beside the losses; None where nothing is trained.
        rows: by the label in tables and pictures.
        baseline: the row to which differences are shown; empty for none.
        measured: the measurements.
        claims: what is checked.
    """

    name: str
    description: str
    paper: str
    size: str
    recipes: list[str]
    data: str
    validation_every: int
    rows: dict[str, Trained]
    baseline: str
    measured: list[Measured]
    claims: list[Claim]
    tokenizer: str = ""
    training_only: list[str] = field(default_factory=list)
    whole_folders: bool = False
    overrides: list[str] = field(default_factory=list)
    recipes_of: dict[str, list[str]] = field(default_factory=dict)
    by_recipe: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    yardsticks: Yardsticks | None = None

    def system_recipes(self, system: str) -> list[str]:
        """The recipes of a system, one after the other."""
        return self.recipes_of.get(system, self.recipes)

    def part(self, labels: Sequence[str], seeds: int | None = None) -> "Experiment":
        """The experiment with some of its rows alone, and at most so many seeds of each; an empty list means all rows.

        Yardsticks stay, and so do the rows that another one is evaluated of. Claims about other rows are left out.

        Raises:
            ValueError: there is no such row, or `seeds` is below 1.
        """
        for label in labels:
            if label not in self.rows:
                raise ValueError(f"row={label!r}: experiment {self.name!r} has {', '.join(self.rows)}")
        if seeds is not None and seeds < 1:
            raise ValueError(f"seeds={seeds}: must be at least 1")
        kept = set(labels or self.rows)
        if self.yardsticks is not None:
            kept |= {label for label in vars(self.yardsticks).values() if isinstance(label, str)}
        kept |= {self.rows[label].of for label in kept} | {part.judge for part in self.measured}
        rows = {label: row for label, row in self.rows.items() if label in kept}
        if seeds is not None:
            rows = {label: replace(row, seeds=min(seeds, row.seeds)) for label, row in rows.items()}
        claims = [claim for claim in self.claims if {claim.smaller.row, claim.larger.row} <= rows.keys()]
        return replace(self, rows=rows, claims=claims, baseline=self.baseline if self.baseline in rows else "")

    def measures_losses(self) -> bool:
        """Whether losses of trained models are compared."""
        return bool(self.recipes) and any(part.task in LOSS_TASKS for part in self.measured)


def experiment_names() -> list[str]:
    """Names that `load_experiment` knows, sorted."""
    return [name for name in file_names(EXPERIMENT_FOLDER) if not name.startswith("_")]


def experiment_description(name: str) -> str:
    """First comment line of an experiment's file."""
    return first_comment(named_file(name, EXPERIMENT_FOLDER, "experiment"))


def load_experiment(name_or_path: str) -> Experiment:
    """Read and check an experiment.

    Raises:
        ValueError: no such experiment; a field is unknown, missing or of the wrong type; a name in it is unknown.
    """
    path = named_file(name_or_path, EXPERIMENT_FOLDER, "experiment")
    source, fields = str(path), {}
    for _, own in read_with_bases(path, EXPERIMENT_FOLDER, "experiment"):
        fields = merged(fields, own)
    fields = {"name": path.stem, "description": first_comment(path), "baseline": ""} | fields
    if fields.get("yardsticks") is not None:
        fields["yardsticks"] = build_strictly(Yardsticks, fields["yardsticks"], source=f"{source}, yardsticks")
    fields["rows"] = {
        label: build_strictly(Trained, row, source=f"{source}, row {label!r}")
        for label, row in (fields.get("rows") or {}).items()
        if row is not None  # a row of the base that is not wanted
    }
    fields["measured"] = [
        build_strictly(Measured, part, source=f"{source}, measured") for part in fields.get("measured") or []
    ]
    fields["claims"] = [build_strictly(Claim, part, source=f"{source}, claims") for part in fields.get("claims") or []]
    experiment = build_strictly(Experiment, fields, source=source)
    _check_names(experiment, source)
    return experiment


def _check_names(experiment: Experiment, source: str) -> None:
    for label, row in experiment.rows.items():
        if "=" in label:
            raise ValueError(f"{source}, row {label!r}: a label must not hold '=', which ends it on a command line")
        system_preset(row.system, experiment.size)
        if row.of and row.of not in experiment.rows:
            raise ValueError(f"{source}, row {label!r}: of={row.of!r} is no row of this experiment")
        if row.seeds < 1:
            raise ValueError(f"{source}, row {label!r}: seeds={row.seeds} must be at least 1")
    if experiment.measures_losses() and experiment.yardsticks is None:
        raise ValueError(
            f"{source}: losses of trained models are measured, but there are no yardsticks; add them, as `base: _tiny` "
            "does"
        )
    for name, label in (vars(experiment.yardsticks) if experiment.yardsticks else {}).items():
        if isinstance(label, str) and label not in experiment.rows:
            raise ValueError(f"{source}, yardsticks: {name}={label!r} is no row of this experiment")
    known = recipe_names()
    named = {"recipes": experiment.recipes, "by_recipe": experiment.by_recipe}
    named |= {f"recipes_of, {system!r},": names for system, names in experiment.recipes_of.items()}
    for where, names in named.items():
        for recipe in names:
            if recipe not in known:
                raise ValueError(f"{source}: {where} has {recipe!r}; choose from {', '.join(known)}")
    for system in {*experiment.recipes_of, *(each for suited in experiment.by_recipe.values() for each in suited)}:
        system_preset(system, experiment.size)
    lengths = {length for part in experiment.measured for length in part.lengths}
    for claim in experiment.claims:
        for number in (claim.smaller, claim.larger):
            if number.row not in experiment.rows:
                raise ValueError(f"{source}, claim {claim.text!r}: row={number.row!r} is no row of this experiment")
            if number.length not in lengths:
                raise ValueError(f"{source}, claim {claim.text!r}: length={number.length} is not measured")
    if experiment.baseline and experiment.baseline not in experiment.rows:
        raise ValueError(f"{source}: baseline={experiment.baseline!r} is no row of this experiment")
