"""`ttt-e2e merge`: a plain model from a LoRA adapter."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import refusals


def merge(
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter, or of the run that trained it.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
) -> None:
    """Add a LoRA adapter to the model that it was trained on, and save a model that needs no peft.

    In Python: `ttt_e2e.training.lora.merge_lora(adapter, output)`.
    """
    from ttt_e2e.storage.claims import claimed
    from ttt_e2e.training.lora import merge_lora

    with refusals(), claimed(output):
        merge_lora(adapter, output)
    typer.echo(f"{output}: load it with AutoModelForCausalLM.from_pretrained")
