"""The three steps behind `ttt-e2e demo`."""

import json
import platform
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline, set_seed

from ttt_e2e import TTTE2ECache
from ttt_e2e.configuration import DemoRecipe
from ttt_e2e.data import TokenStore, document_prefixes, longest_reading, tokenize_documents
from ttt_e2e.data.sources import load_documents
from ttt_e2e.data.tokenizer import load_tokenizer
from ttt_e2e.evaluation import read_tokens
from ttt_e2e.evaluation.experiment_report import loss_comparison
from ttt_e2e.evaluation.results import environment
from ttt_e2e.model_cards import ModelCardContents, ResultsSection, TrainingHistory, write_model_card
from ttt_e2e.storage.disk import follow_umask, write_text

from .reproduce_steps import VALIDATION, ExperimentRun, run_experiment

SEED = 0  # of what is written
# Cool enough for a model of this size to stay near what it has learned.
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1}


def run_demo(recipe: DemoRecipe, folder: Path, console: Console, processes: int | None = None) -> dict:
    """Run all steps and return what is also written to `results.json`; models that are there already are kept.

    Args:
        recipe: what is compared, read and written.
        folder: where everything is written.
        console: where tables and texts are shown.
        processes: that train at once; None: as `train_rows` says.
    """
    started = time.perf_counter()
    console.rule("1/3  Train and compare")
    run = run_experiment(recipe.compared(), folder, folder / "models", folder / "cache", console, processes)

    console.rule("2/3  Save, load, generate")
    save_model(recipe, run, folder / "model")
    validation = validation_tokens(folder)
    continue_document(recipe, validation, folder / "model", console)

    console.rule("3/3  Read once, keep what was learned")
    context_facts = read_and_continue(recipe, validation, folder, console)

    results = {
        "environment": environment(),
        "training": {
            label: {"tokens": row.tokens, "cpu_seconds": row.cpu_seconds, "seeds": len(row.models)}
            for label, row in run.rows.items()
        },
        "claims": [vars(verdict) for verdict in run.verdicts],
        "learned_context": context_facts,
        "seconds": time.perf_counter() - started,
    }
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    console.rule()
    console.print(
        f"{results['seconds'] / 60:.1f} minutes. Look at {folder / 'report.md'} and "
        f"{folder / '0-loss-by-position' / 'results.png'}; the model is in {folder / 'model'}."
    )
    return results


def save_model(recipe: DemoRecipe, run: ExperimentRun, folder: Path) -> None:
    """Save the row's model, its tokenizer and a model card into one folder."""
    experiment, row = recipe.compared(), run.rows[recipe.row]
    model = AutoModelForCausalLM.from_pretrained(row.models[0])
    model.save_pretrained(folder)
    load_tokenizer(row.models[0]).save_pretrained(folder)
    [measured] = experiment.measured
    table = loss_comparison(experiment, run.rows, run.points, measured.lengths)
    facts = {"tokens": f"{row.tokens:,}", "time": f"{row.cpu_seconds:.0f} CPU seconds on {environment()['device']}"}
    source = f"Source files of the standard library of Python {platform.python_version()}."
    contents = ModelCardContents(
        name="TTT-E2E demo",
        config=model.config,
        parameters=model.num_parameters(),
        dtype=model.dtype,
        training=TrainingHistory(source, facts),
        results=[ResultsSection("Measured by `ttt-e2e demo`.", [table])],
    )
    write_model_card(folder, contents)
    follow_umask(folder)


def validation_tokens(folder: Path) -> TokenStore:
    """The documents that no row was trained on, as tokens."""
    documents = load_documents(folder / VALIDATION, cache_folder=folder / "cache")
    return tokenize_documents(documents, load_tokenizer(str(folder / "model")), folder / "cache")


def continue_document(recipe: DemoRecipe, validation: TokenStore, model_folder: Path, console: Console) -> None:
    """Load the folder with the Auto classes and let the text-generation pipeline continue a validation file."""
    settings = recipe.generation
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    names, documents = document_prefixes(validation, settings.prompt_tokens + settings.new_tokens, 1)
    prompt = str(tokenizer.decode(documents[0, : settings.prompt_tokens], skip_special_tokens=True))
    set_seed(SEED)
    written: Any = generator(prompt, max_new_tokens=settings.new_tokens, return_full_text=False, **SAMPLING)
    show_continuation(console, names[0], prompt, written[0]["generated_text"])


def read_and_continue(recipe: DemoRecipe, validation: TokenStore, folder: Path, console: Console) -> dict:
    """Read a long file once, save what was learned, load it into a freshly loaded model and continue.

    Returns:
        The size of the learned context in bytes after the shorter and after the longer reading.
    """
    settings = recipe.generation
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    paths, tokens = longest_reading(validation, settings.long_read_tokens + 1)
    sequence = tokens[None].to(model.device)
    cache, sizes = TTTE2ECache(model.config), {}
    for start, end in [(0, settings.short_read_tokens), (settings.short_read_tokens, settings.long_read_tokens)]:
        read_tokens(model, sequence[:, start:end], cache, settings.read_step, description=f"Reading to {end:,}")
        sizes[end] = cache.nbytes
        console.print(f"Learned context after {end:,} tokens: {cache.nbytes:,} bytes")
    cache.save_pretrained(folder / "learned_context")

    model, tokenizer = (auto.from_pretrained(folder / "model") for auto in (AutoModelForCausalLM, AutoTokenizer))
    loaded = TTTE2ECache.from_pretrained(folder / "learned_context", model=model)
    set_seed(SEED)
    # generate takes the whole sequence and reads only what the cache has not seen: here one more token of the file.
    output = model.generate(sequence, cache=loaded, max_new_tokens=settings.new_tokens, **SAMPLING)
    prompt, continuation = map(str, map(tokenizer.decode, (sequence[0, -300:], output[0, sequence.shape[1] :])))
    title = f"{' + '.join(paths)}, from the saved context"
    show_continuation(console, title, prompt, continuation)
    return {"files": paths, "bytes_after_tokens": sizes}


def show_continuation(console: Console, title: str, prompt: str, continuation: str) -> None:
    """Show the last lines of a prompt and, in another colour, what the model wrote after it."""
    text = Text("".join(prompt.splitlines(keepends=True)[-6:])).append(continuation, style="bold cyan")
    console.print(Panel(text, title=title))
