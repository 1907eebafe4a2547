"""`ttt-e2e merge`: a plain model from an adapter, or from new weights and their base."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import refusals


def merge(
    adapter: Annotated[
        Path, typer.Option(help="Folder of the LoRA adapter or of the new weights, or of the run that trained them.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Where the model below new weights is: a folder, a GGUF file, or an id of the Hub. [default: where it "
            "was in training]"
        ),
    ] = None,
) -> None:
    """Save one model of a LoRA adapter, or of new weights (train --train prime), and the model below them.

    In Python: `ttt_e2e.training.lora.merge_lora(adapter, output)`, and for new weights
    `ttt_e2e.conversion.PrimeWeights.from_pretrained(adapter).on_base(base)`, which is a model in memory.
    """
    from ttt_e2e.conversion.prime_weights import PRIME_CONFIG, merge_prime
    from ttt_e2e.storage.claims import claimed
    from ttt_e2e.storage.record import saved_folder
    from ttt_e2e.training.lora import merge_lora

    with refusals(), claimed(output):
        if saved_folder(adapter.expanduser(), PRIME_CONFIG):
            merge_prime(adapter, output, base)
        elif base is not None:
            raise ValueError(f"base={base!r}: a LoRA adapter names its model in its adapter_config.json; leave it out")
        else:
            merge_lora(adapter, output)
    typer.echo(f"{output}: load it with AutoModelForCausalLM.from_pretrained")
