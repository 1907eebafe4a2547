"""`ttt-e2e presets`: what model presets there are, and what is in one."""

from typing import Annotated

import typer


def presets(
    name: Annotated[str | None, typer.Argument(help="A preset to print as YAML. Without it: a list of all.")] = None,
) -> None:
    """List the model presets, or print one.

    In Python: `TTTE2EConfig(**ttt_e2e.configuration.load_preset("125m"))`.
    """
    import yaml

    from ..configuration import load_preset, preset_description, preset_names

    if name is None:
        for known in preset_names():
            typer.echo(f"{known:28}{preset_description(known)}")
        return
    try:
        fields = load_preset(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(yaml.safe_dump(fields, sort_keys=False), nl=False)
