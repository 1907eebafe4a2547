"""`ttt-e2e presets`: what model presets and training recipes there are, and what is in one."""

from typing import Annotated

import typer

from .errors import refusals


def presets(
    name: Annotated[
        str | None, typer.Argument(help="A model preset or a recipe to print as YAML. Without it: a list of all.")
    ] = None,
    model: Annotated[str, typer.Option(help="The model for which a recipe is printed.")] = "125m",
) -> None:
    """List the model presets and the training recipes, or print one.

    In Python: `TTTE2EConfig(**ttt_e2e.configuration.load_preset("125m"))` and
    `ttt_e2e.configuration.load_recipe("pretrain-8k", "125m")`.
    """
    import dataclasses

    import yaml

    from ttt_e2e.configuration import load_preset, load_recipe, recipe_names

    if name is None:
        _list_all()
        return
    heading = ""
    with refusals():
        if name in recipe_names():
            load_preset(model)  # a misspelt model would get the numbers of another one
            fields = dataclasses.asdict(load_recipe(name, model))
            # As comments, so that the output can be a recipe's file.
            heading = f"# {fields.pop('description')}\n# {fields.pop('name')}, as it is for {model}.\n"
        else:
            fields = load_preset(name)
    typer.echo(heading + yaml.safe_dump(fields, sort_keys=False), nl=False)


def _list_all() -> None:
    from ttt_e2e.configuration import preset_description, preset_names, recipe_description, recipe_names

    kinds = {"Models": (preset_names(), preset_description), "Recipes": (recipe_names(), recipe_description)}
    for title, (names, description) in kinds.items():
        typer.echo(f"{title}:")
        for known in names:
            typer.echo(f"  {known:24}{description(known)}")
