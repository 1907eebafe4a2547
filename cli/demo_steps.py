"""The five steps behind `ttt-e2e demo`."""

import json
import platform
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    pipeline,
    set_seed,
)

from ttt_e2e import TTTE2ECache, TTTE2EForCausalLM
from ttt_e2e.configuration import DataRecipe, DemoRecipe, Recipe, load_preset
from ttt_e2e.data import TokenStore, document_prefixes, longest_reading
from ttt_e2e.data.run_data import DataRequest, prepare_data
from ttt_e2e.data.sources import STANDARD_LIBRARY
from ttt_e2e.evaluation import (
    Table,
    bucket_bounds,
    bucket_means,
    loss_by_position,
    loss_table,
    plot_loss_by_position,
    read_tokens,
)
from ttt_e2e.evaluation.results import environment
from ttt_e2e.model_cards import ModelCardContents, ResultsSection, TrainingHistory, write_model_card
from ttt_e2e.storage.disk import follow_umask, write_text
from ttt_e2e.training.run import TrainingRequest, finish_run, kept_folder, prepare_run

LEARNING_ON, LEARNING_OFF = "TTT-E2E, learning on", "TTT-E2E, learning off"
# Cool enough for a model of this size to stay near what it has learned.
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1}


@dataclass
class DemoData:
    """Tokenizer, the tokens of the validation documents, and what is told about both and the training documents."""

    tokenizer: PreTrainedTokenizerBase
    validation: TokenStore
    facts: dict


@dataclass
class TrainingFacts:
    """What a training run measured.

    Attributes:
        seconds: wall-clock time of all steps.
        tokens: tokens trained on.
        losses: (step, mean loss in nats since the last entry) at every logging step.
    """

    seconds: float
    tokens: int
    losses: list[tuple[int, float]]


def run_demo(recipe: DemoRecipe, folder: Path, console: Console) -> dict:
    """Run all steps and return what is also written to `results.json`.

    Args:
        recipe: sizes and steps.
        folder: where everything is written.
        console: where tables and texts are shown.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)

    console.rule("1/5  Tokenizer and data")
    data = prepare_demo_data(recipe, folder / "cache")
    console.print(data.facts)

    console.rule("2/5  Training: TTT-E2E and two baselines")
    models, runs = train_all(recipe, folder, console)

    console.rule("3/5  Loss by token position")
    evaluated, systems, table = evaluate_all(recipe, models, runs, data, folder)
    console.print(table.rich())
    baseline = next(iter(recipe.baselines))
    gain = gain_over(evaluated[LEARNING_ON], evaluated[baseline])
    console.print(
        f"{LEARNING_ON}, is {gain['mean']:.3f} nats per token better than {baseline} "
        f"(standard error over documents {gain['standard_error']:.3f})."
    )

    console.rule("4/5  Save, load, generate")
    save_model(models["TTT-E2E"], data, runs["TTT-E2E"], table, folder / "model")
    continue_document(recipe, data, folder / "model", console)

    console.rule("5/5  Read once, keep what was learned")
    context_facts = read_and_continue(recipe, data, folder, console)

    results = {
        "environment": environment(),
        "recipe": asdict(recipe),
        "data": data.facts,
        "training": {name: asdict(run) for name, run in runs.items()},
        "buckets": bucket_bounds(recipe.evaluation.bucket_edges, recipe.evaluation.length),
        "systems": systems,
        "gain": gain,
        "learned_context": context_facts,
        "seconds": time.perf_counter() - started,
    }
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / "results.md", f"{table.title}\n\n{table.markdown()}")
    console.rule()
    console.print(
        f"{results['seconds'] / 60:.1f} minutes. Look at {folder / 'loss_by_position.png'}; the numbers are in "
        f"{folder / 'results.json'}, the model in {folder / 'model'}."
    )
    return results


def training_recipe(recipe: DemoRecipe) -> Recipe:
    """How `ttt-e2e train` would be told to train a model of the demo."""
    training = {"per_device_train_batch_size": 8, "save_strategy": "no", "seed": recipe.seed} | recipe.training
    return Recipe(
        name="demo",
        description="",
        batch_size=training["per_device_train_batch_size"] * training.pop("gradient_accumulation_steps", 1),
        model={},
        data=DataRecipe(
            sequence_length=recipe.data.training_length,
            validation_every=recipe.data.validation_every,
            training_only=recipe.data.training_only,
            validation_rows=1,  # losses are measured after training, by position
        ),
        training=training,
    )


def prepare_demo_data(recipe: DemoRecipe, cache_folder: Path) -> DemoData:
    """Step 1: split the standard library by file, train the tokenizer on the training part, make rows of tokens.

    They stay in the cache, where the training runs find them.
    """
    request = DataRequest(
        data=STANDARD_LIBRARY,
        validation_data=None,
        tokenizer=None,
        vocabulary_size=load_preset(recipe.test_time_training)["vocab_size"],
        recipe=replace(training_recipe(recipe).data, validation_rows=None),
        cache=cache_folder,
    )
    data = prepare_data(request, check_tokenizer=lambda tokenizer: None)
    training, validation = data.rows.store, data.validation.store
    facts = {
        "training_files": training.num_documents,
        "training_tokens": training.num_tokens,
        "validation_files": validation.num_documents,
        "validation_tokens": validation.num_tokens,
        "vocabulary": len(data.tokenizer),
    }
    return DemoData(data.tokenizer, validation, facts)


def train_all(
    recipe: DemoRecipe, folder: Path, console: Console
) -> tuple[dict[str, PreTrainedModel], dict[str, TrainingFacts]]:
    """Step 2: train TTT-E2E and the baselines on the same rows in the same order, each as `ttt-e2e train` does."""
    models, runs = {}, {}
    for name, preset in {"TTT-E2E": recipe.test_time_training, **recipe.baselines}.items():
        with tempfile.TemporaryDirectory(prefix=".training-", dir=folder) as output:
            request = TrainingRequest(
                model=preset,
                recipe=training_recipe(recipe),
                data=STANDARD_LIBRARY,
                output=Path(output),
                cache=folder / "cache",
            )
            with kept_folder(request):
                trainer = prepare_run(request)
                console.print(f"{name}: {trainer.model.num_parameters():,} parameters")
                finish_run(trainer, checkpoint=None)
        models[name], runs[name] = trainer.model, training_facts(trainer, request.recipe)
        console.print(f"{name}: {runs[name].tokens:,} tokens in {runs[name].seconds:.0f} s")
    return models, runs


def training_facts(trainer: Trainer, recipe: Recipe) -> TrainingFacts:
    """What the log of a finished run says."""
    log = trainer.state.log_history
    return TrainingFacts(
        seconds=next(entry["train_runtime"] for entry in log if "train_runtime" in entry),
        tokens=trainer.state.global_step * recipe.batch_size * (recipe.data.sequence_length + 1),
        losses=[(entry["step"], entry["loss"]) for entry in log if "loss" in entry],
    )


def evaluate_all(
    recipe: DemoRecipe,
    models: dict[str, TTTE2EForCausalLM],
    runs: dict[str, TrainingFacts],
    data: DemoData,
    folder: Path,
) -> tuple[dict[str, torch.Tensor], list[dict], Table]:
    """Step 3: loss by position of TTT-E2E with learning on and off and of the baselines; draws the picture."""
    settings = recipe.evaluation
    _, documents = document_prefixes(data.validation, settings.length, settings.documents)
    # By shown name: the trained model, and what to pass to its forward.
    variants = {LEARNING_ON: ("TTT-E2E", {}), LEARNING_OFF: ("TTT-E2E", {"test_time_training": False})}
    variants |= {name: (name, {}) for name in recipe.baselines}
    evaluated = {
        shown: loss_by_position(models[name], documents, settings.batch_size, description=shown, **arguments)
        for shown, (name, arguments) in variants.items()
    }
    bounds = bucket_bounds(settings.bucket_edges, settings.length)
    systems = [
        {
            "name": shown,
            "parameters": models[variants[shown][0]].num_parameters(),
            "training_seconds": runs[variants[shown][0]].seconds,
            "loss": losses.mean().item(),
            "loss_by_bucket": bucket_means(losses, bounds),
        }
        for shown, losses in evaluated.items()
    ]
    title = (
        f"Loss in nats per token by position, first {settings.length} tokens of {len(documents)} validation files, "
        f"trained at {recipe.data.training_length}"
    )
    table = loss_table(systems, bounds, title)
    plot_loss_by_position(evaluated, recipe.data.training_length, folder / "loss_by_position.png")
    return evaluated, systems, table


def gain_over(losses: torch.Tensor, baseline_losses: torch.Tensor) -> dict[str, float]:
    """How much lower the loss is than the baseline's on the same documents, with the standard error of the mean."""
    differences = (baseline_losses - losses).mean(dim=1)
    standard_error = differences.std() / len(differences) ** 0.5
    return {"mean": differences.mean().item(), "standard_error": standard_error.item()}


def save_model(model: TTTE2EForCausalLM, data: DemoData, run: TrainingFacts, table: Table, folder: Path) -> None:
    """Save model, tokenizer and model card into one folder."""
    model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    facts = {
        "tokens": f"{run.tokens:,}",
        "time": f"{run.seconds:.0f} s on {environment()['device']}",
    }
    source = (
        f"{data.facts['training_files']} source files of the standard library of Python {platform.python_version()}."
    )
    contents = ModelCardContents(
        name="TTT-E2E demo",
        config=model.config,
        parameters=model.num_parameters(),
        dtype=model.dtype,
        training=TrainingHistory(source, facts),
        results=[ResultsSection("Measured by `ttt-e2e demo`; all systems read the same rows in training.", [table])],
    )
    write_model_card(folder, contents)
    follow_umask(folder)


def continue_document(recipe: DemoRecipe, data: DemoData, model_folder: Path, console: Console) -> None:
    """Step 4: load the folder with the Auto classes and let the text-generation pipeline continue a validation file."""
    settings = recipe.generation
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    names, documents = document_prefixes(data.validation, settings.prompt_tokens + settings.new_tokens, 1)
    prompt = str(tokenizer.decode(documents[0, : settings.prompt_tokens], skip_special_tokens=True))
    set_seed(recipe.seed)
    written: Any = generator(prompt, max_new_tokens=settings.new_tokens, return_full_text=False, **SAMPLING)
    show_continuation(console, names[0], prompt, written[0]["generated_text"])


def read_and_continue(recipe: DemoRecipe, data: DemoData, folder: Path, console: Console) -> dict:
    """Step 5: read a long file once, save what was learned, load it into a freshly loaded model and continue.

    Returns:
        The size of the learned context in bytes after the shorter and after the longer reading.
    """
    settings = recipe.generation
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    paths, tokens = longest_reading(data.validation, settings.long_read_tokens + 1)
    sequence = tokens[None].to(model.device)
    cache, sizes = TTTE2ECache(model.config), {}
    for start, end in [(0, settings.short_read_tokens), (settings.short_read_tokens, settings.long_read_tokens)]:
        read_tokens(model, sequence[:, start:end], cache, settings.read_step, description=f"Reading to {end:,}")
        sizes[end] = cache.nbytes
        console.print(f"Learned context after {end:,} tokens: {cache.nbytes:,} bytes")
    cache.save_pretrained(folder / "learned_context")

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    loaded = TTTE2ECache.from_pretrained(folder / "learned_context", model=model)
    set_seed(recipe.seed)
    # generate takes the whole sequence and reads only what the cache has not seen: here one more token of the file.
    output = model.generate(sequence, cache=loaded, max_new_tokens=settings.new_tokens, **SAMPLING)
    prompt, continuation = map(str, map(data.tokenizer.decode, (sequence[0, -300:], output[0, sequence.shape[1] :])))
    title = f"{' + '.join(paths)}, from the saved context"
    show_continuation(console, title, prompt, continuation)
    return {"files": paths, "bytes_after_tokens": sizes}


def show_continuation(console: Console, title: str, prompt: str, continuation: str) -> None:
    """Show the last lines of a prompt and, in another colour, what the model wrote after it."""
    text = Text("".join(prompt.splitlines(keepends=True)[-6:])).append(continuation, style="bold cyan")
    console.print(Panel(text, title=title))
