"""Write the README.md of a saved model: only what was measured goes in."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..evaluation import Table

TEMPLATE = Path(__file__).with_name("template.md")


def write_model_card(
    folder: Path, config, name: str, training_text: str, training_facts: dict[str, str], results: Table
) -> Path:
    """Write `README.md` into a folder that holds a saved model.

    Args:
        folder: as given to `save_pretrained`.
        config: the model's `TTTE2EConfig`.
        name: title of the card.
        training_text: what the model was trained on, a sentence.
        training_facts: measured or chosen facts of the training run by their name, for a list.
        results: the evaluation; its title says on what it was measured.

    Returns:
        The file's path.

    Raises:
        FileNotFoundError: the folder does not hold a saved model.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"folder={folder}: holds no config.json; save the model there first")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["ttt-e2e", "test-time-training"],
        model_name=name,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        config=config,
        training_text=training_text,
        training_facts=training_facts,
        results_title=results.title,
        results_table=results.markdown(),
    )
    card.save(folder / "README.md")
    return folder / "README.md"
