"""`ttt-e2e convert`: models between this package and other layouts."""

import math
from pathlib import Path
from typing import Annotated

import typer

from .errors import refusals

TOLERANCE = 5e-5

convert = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Convert models between this package and other layouts."
)


@convert.command()
def official(
    checkpoint: Annotated[
        str,
        typer.Option(
            help="The Orbax checkpoint: its root (the newest step is taken), a step's folder, or the model_weights in "
            "it. A path, or an address as gs://bucket/path, which is downloaded first."
        ),
    ],
    size: Annotated[
        str,
        typer.Option(
            help="125m, 350m, 760m, 1b, 3b or another preset of ours, or a config.json with the groups model and "
            "training of the official configuration."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write, new or empty.", file_okay=False)],
    tokenizer: Annotated[
        str | None, typer.Option(help="A folder or an id of the Hub: the checkpoint's tokenizer, saved with the model.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the written weights: float32 or bfloat16.")] = "float32",
    max_shard_size: Annotated[
        str, typer.Option(help="Of the files, as 5GB. One of them, and one stacked tensor, is in memory at a time.")
    ] = "50GB",
    verify: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Afterwards compare the loss of every token with reference numbers: a safetensors file with "
            "batch.input_ids [rows, T], integers, and out.token_nll [rows, T], the loss in nats of the token after "
            "each; the last column counts only if batch.target_tokens [rows, T] is there too.",
            dir_okay=False,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help=f"Of --verify: the largest difference in nats that passes. [default: {TOLERANCE}]", min=0),
    ] = None,
    project: Annotated[
        str | None, typer.Option(help="The Google Cloud project that pays for reading a requester-pays bucket.")
    ] = None,
) -> None:
    """A checkpoint of the official JAX implementation into a folder of transformers, without jax.

    Try it: `ttt-e2e convert official --checkpoint path/of/125m --size 125m --tokenizer path/of/tokenizer --output
    models/125m`

    With `--verify` the exit code is 1 if a loss is further from its reference than `--tolerance`; the folder stays.

    In Python: `ttt_e2e.conversion.convert_official(checkpoint, size, output)`.
    """
    from ttt_e2e.conversion import convert_official
    from ttt_e2e.conversion.official_checkpoint import official_config
    from ttt_e2e.conversion.verification import largest_difference, load_reference
    from ttt_e2e.storage.claims import claimed

    with refusals():
        if tolerance is not None and verify is None:
            raise ValueError(f"--tolerance {tolerance} is of --verify: name the file of reference numbers as well")
        output = output.expanduser()
        reference = None if verify is None else load_reference(verify, official_config(size).vocab_size)
        with claimed(output):
            weights = convert_official(
                checkpoint,
                size,
                output,
                tokenizer=tokenizer,
                dtype=dtype,
                max_shard_size=max_shard_size,
                project=project,
            )
    typer.echo(f"{output}: converted from {weights}; load it with AutoModelForCausalLM.from_pretrained")
    if reference is None:
        return
    difference, allowed = largest_difference(output, reference), TOLERANCE if tolerance is None else tolerance
    tokens = math.prod(reference.token_nll.shape)
    typer.echo(f"largest difference to the {tokens:,} reference losses: {difference:.3g} nats (tolerance {allowed:g})")
    if not difference <= allowed:  # NaN does not pass
        typer.echo(f"{output} does not reproduce {verify}.", err=True)
        raise typer.Exit(1)


@convert.command("to-official")
def to_official(
    model: Annotated[Path, typer.Option(help="Folder of the saved model, or of the run that trained it.")],
    output: Annotated[Path, typer.Option(help="Folder to write, new or empty.", file_okay=False)],
) -> None:
    """A saved model as a checkpoint that the official JAX implementation restores (step 0, weights only).

    Beside the step lies `config.json`, the official configuration, which `ttt-e2e convert official --size` reads.

    In Python: `ttt_e2e.conversion.export_official(model, output)`.
    """
    from ttt_e2e.conversion import export_official
    from ttt_e2e.storage.claims import claimed

    with refusals(), claimed(output):
        export_official(model, output)
    typer.echo(f"{output}: step 0 holds model_weights; its configuration is {output / 'config.json'}")


@convert.command("ttt-layers")
def ttt_layers(
    checkpoint: Annotated[
        Path, typer.Option(help="Folder with the official config.json and weights (.safetensors or .bin).")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write, new or empty.", file_okay=False)],
    tokenizer: Annotated[
        str | None, typer.Option(help="A folder or an id of the Hub: the checkpoint's tokenizer, saved with the model.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the written weights: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """A checkpoint of the official PyTorch code of TTT-Linear and TTT-MLP into a folder of transformers.

    In Python: `ttt_e2e.conversion.convert_ttt_layers(checkpoint, output)`.
    """
    from ttt_e2e.conversion import convert_ttt_layers
    from ttt_e2e.storage.claims import claimed

    with refusals(), claimed(output):
        parameters = convert_ttt_layers(checkpoint, output, tokenizer=tokenizer, dtype=dtype)
    typer.echo(f"{output}: {parameters:,} parameters; load it with AutoModelForCausalLM.from_pretrained")
