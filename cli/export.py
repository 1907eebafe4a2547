"""`ttt-e2e export`: a folder for the Hub that works without this package."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import refusals


def export(
    model: Annotated[str, typer.Option(help="Folder of a saved model, or of a run of `ttt-e2e train`.")],
    output: Annotated[Path, typer.Option(help="Folder to write, new or empty.", file_okay=False)],
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: float32 or bfloat16. [default: as they were saved]")
    ] = None,
    results: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[DATA=]FOLDER",
            help="A folder of `ttt-e2e evaluate` for the card; DATA says what was read. Give it several times for "
            "several.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Title of the card. [default: the folder's name]")] = None,
    license: Annotated[
        str | None, typer.Option(help="Of the weights, for the card, as the Hub names it: apache-2.0.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="REPO_ID",
            help="Of new weights alone (train --train prime): where others find the model below. [default: its name in "
            "training]",
        ),
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="REPO_ID", help="Upload the folder to this repository of the Hub as well.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="Of the upload.")] = None,
) -> None:
    """Export a model for people who do not have this package.

    Try it: `ttt-e2e export --model runs/tiny --output hub/tiny --results 'standard library=results/context'`

    Written to the folder: weights, configuration, generation settings, tokenizer, the code that runs the model, and a
    model card. With nothing but transformers, `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`
    loads it. Of new weights alone (train --train prime) it writes these, and the name of their base. Numbers on the
    card come from `--results`, the configuration and the run's record alone.

    `--push my-name/my-model` uploads the folder as one commit (token: `hf auth login`).
    """
    from ttt_e2e.conversion.prime_weights import PRIME_CONFIG
    from ttt_e2e.model_cards.export import ExportRequest, prepare_export, write_export
    from ttt_e2e.model_cards.export_prime import prepare_prime_export, write_prime_export
    from ttt_e2e.model_cards.push import check_push, push_folder
    from ttt_e2e.storage.claims import claimed
    from ttt_e2e.storage.record import saved_folder

    request = ExportRequest(model, output, dtype, tuple(results or ()), name, license, base)
    with refusals():
        for option, given in {"--private": private, "--commit-message": commit_message}.items():
            if given and push is None:
                raise ValueError(f"{option} is for an upload: name a repository with --push, or leave it out")
        if push is not None:
            check_push(push, private)
        with claimed(output):
            if saved_folder(Path(model).expanduser(), PRIME_CONFIG):
                folder, how = write_prime_export(prepare_prime_export(request)), "ttt_e2e.conversion.PrimeWeights"
            else:
                folder, how = write_export(prepare_export(request)), "trust_remote_code=True, where ttt_e2e is missing"
        size = sum(path.stat().st_size for path in folder.iterdir())
        typer.echo(f"{folder}: {size / 2**20:.1f} MiB; load it with {how}")
        if push is not None:
            typer.echo(f"Uploaded: {push_folder(folder, push, private or None, commit_message)}")
