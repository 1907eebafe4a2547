"""The steps behind `ttt-e2e tune-outer`: every system of an experiment at several learning rates, for fewer tokens."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console

from ttt_e2e.configuration import Recipe, system_preset
from ttt_e2e.configuration.experiments import Experiment, Trained
from ttt_e2e.evaluation.tables import Table
from ttt_e2e.storage.disk import write_json, write_text
from ttt_e2e.training.run import MODEL

from .experiment_training import read_log, row_recipes, runs_of, train_recipe, what_it_took

RATES = ("learning_rate", "muon_learning_rate")
FURTHER = 2  # steps beyond the grid
CHOSEN = tuple(f"training.{name}=" for name in RATES)  # overrides of an experiment that are chosen anew


@dataclass(frozen=True)
class Tried:
    """One training of the grid.

    Attributes:
        factor: of the recipe's learning rates.
        rates: the learning rates themselves, by name.
        loss: nats per token of the documents that were kept back for tuning; infinite where training broke down.
    """

    system: str
    factor: float
    rates: dict[str, float]
    tokens: int
    loss: float


def tune_outer(
    experiment: Experiment,
    recipe: str,
    factors: Sequence[float],
    share: float,
    folder: Path,
    models_folder: Path,
    cache: Path,
    console: Console,
) -> dict[str, list[str]]:
    """Train each system at each rate; what is trained already is kept.

    Args:
        recipe: of the experiment's, the one whose rates are chosen. Recipes before it are trained as the experiment
            says, for the same share of their steps.

    Returns:
        By system, the overrides of the best rates, as the experiment's `by_recipe` has them for that recipe.
    """
    tried: list[Tried] = []
    for row in rows_to_tune(experiment, recipe).values():
        own: list[Tried] = []
        while (factor := next_factor(own, factors)) is not None:
            console.rule(f"{row.system}, {factor:g} times the learning rates of {recipe}")
            own.append(try_rate(experiment, row, recipe, factor, share, models_folder, cache))
            write_json(folder / "tuning.json", [dataclasses.asdict(each) for each in tried + own])
        tried += own
    table, best = tuning_table(tried), best_overrides(tried)
    shown = yaml.safe_dump({"by_recipe": {recipe: best}}, sort_keys=False)
    write_text(folder / "tuning.md", f"{table.title}\n\n{table.markdown()}\n```yaml\n{shown}```\n")
    console.print(table.rich())
    console.print(f"In the experiment's file:\n{shown}")
    return best


def next_factor(tried: Sequence[Tried], factors: Sequence[float]) -> float | None:
    """What is tried next for a system: the grid, and then beyond it as long as the best stands at its edge.

    Args:
        tried: for this system until now.
        factors: the grid.

    Returns:
        None where the best has been found, or has run away over `FURTHER` steps.
    """
    done = sorted(each.factor for each in tried)
    missing = [factor for factor in factors if factor not in done]
    if missing:
        return missing[0]
    best = min(tried, key=lambda each: each.loss).factor
    if len(done) < 2 or len(done) >= len(factors) + FURTHER or best not in (done[0], done[-1]):
        return None
    return best * best / (done[1] if best == done[0] else done[-2])


def rows_to_tune(experiment: Experiment, recipe: str) -> dict[str, Trained]:
    """By system that has the recipe, the row that is trained as its preset says; TTT-naive trains the static twin."""
    rows = {
        row.system: row
        for row in experiment.rows.values()
        if not row.of and not row.model and recipe in experiment.system_recipes(row.system)
    }
    if "static-twin" in rows:
        rows.pop("ttt-naive", None)
    return rows


def try_rate(
    experiment: Experiment, row: Trained, recipe: str, factor: float, share: float, models_folder: Path, cache: Path
) -> Tried:
    """Train a system for a share of its steps, with the learning rates of one recipe times a factor."""
    preset, suited = system_preset(row.system, experiment.size), experiment.by_recipe.get(recipe, {})
    others = [text for text in suited.get(row.system, ()) if not text.startswith(CHOSEN)]
    plain = dataclasses.replace(experiment, by_recipe=experiment.by_recipe | {recipe: suited | {row.system: others}})
    last_one = experiment.system_recipes(row.system).index(recipe)
    *earlier, last = row_recipes(plain, Trained(row.system), preset)[: last_one + 1]
    recipes = [*(tuning_recipe(each, 1.0, share) for each in earlier), tuning_recipe(last, factor, share)]
    model, tokens = preset, 0
    for each, run in runs_of(experiment, preset, recipes, models_folder):
        train_recipe(experiment, model, each, run, cache)
        model, tokens = str(run / MODEL), tokens + what_it_took(each, run).tokens
    loss = next(entry["eval_loss"] for entry in reversed(read_log(run)) if "eval_loss" in entry)
    rates = {name: each.training[name] for name in RATES if name in each.training}
    return Tried(row.system, factor, rates, tokens, loss if math.isfinite(loss) else math.inf)


def tuning_recipe(recipe: Recipe, factor: float, share: float) -> Recipe:
    """A recipe with other learning rates, for a share of its steps, measured on documents that are kept for it."""
    rates = {name: recipe.training[name] * factor for name in RATES if recipe.training.get(name) is not None}
    steps = max(1, round(recipe.training["max_steps"] * share))
    shorter = {"max_steps": steps, "eval_strategy": "no", "save_strategy": "no"}
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}-tuning",
        data=dataclasses.replace(recipe.data, tuning=True),
        training=recipe.training | rates | shorter,
    )


def best_overrides(tried: Sequence[Tried]) -> dict[str, list[str]]:
    """By system, what the best of its rates is in an experiment's file."""
    best: dict[str, Tried] = {}
    for each in tried:
        if each.system not in best or each.loss < best[each.system].loss:
            best[each.system] = each
    return {system: [f"training.{name}={rate:g}" for name, rate in each.rates.items()] for system, each in best.items()}


def tuning_table(tried: Sequence[Tried]) -> Table:
    """Losses by system and factor, the best of each system in bold."""
    factors = sorted({each.factor for each in tried})
    rows = []
    for system in dict.fromkeys(each.system for each in tried):
        losses = {each.factor: each.loss for each in tried if each.system == system}
        least = min(losses.values())
        shown = {factor: f"**{loss:.3f}**" if loss == least else f"{loss:.3f}" for factor, loss in losses.items()}
        rows.append([system, *(shown.get(factor, "") for factor in factors)])
    title = f"Loss after {max(each.tokens for each in tried):,} tokens, by the factor of the recipe's learning rates"
    return Table(title, ["", *(f"{factor:g}" for factor in factors)], rows)
