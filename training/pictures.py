"""A picture of a training log: what one looks at before reading numbers."""

from pathlib import Path

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

LEGEND_ENTRIES = 8
SHADES = colormaps["viridis"]


def plot_training(history: list[dict], path: Path) -> None:
    """Draw losses, loss by mini-batch, inner gradient norm and learning rate over the outer steps.

    Args:
        history: `trainer.state.log_history`.
        path: of the PNG file.
    """
    logs = [entry for entry in history if "loss" in entry]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    figure = Figure(figsize=(11, 7), layout="constrained")
    losses, by_mini_batch, norms, rates = figure.subplots(2, 2).flatten()

    _draw(losses, logs, "loss", "training")
    _draw(losses, evaluations, "eval_loss", "validation, learning on")
    _draw(losses, evaluations, "eval_loss_learning_off", "validation, learning off")
    losses.set(title="Loss", ylabel="nats per token")

    count = sum(name.startswith("nll_mini_batch_") for name in logs[-1]) if logs else 0
    for index in range(0, count, max(1, -(-count // LEGEND_ENTRIES))):
        name, label = f"nll_mini_batch_{index}", f"mini-batch {index}"
        _draw(by_mini_batch, logs, name, label, color=SHADES(index / count))
    by_mini_batch.set(title="Loss by mini-batch of a row, before its own inner step", ylabel="nats per token")

    _draw(norms, logs, "inner_grad_norm", "inner gradient, before clipping")
    _draw(norms, logs, "grad_norm", "outer gradient, before clipping")
    norms.set(title="Gradient norms", yscale="log")

    _draw(rates, logs, "learning_rate", "outer learning rate")
    rates.set(title="Learning rate")

    for axes in (losses, by_mini_batch, norms, rates):
        axes.set_xlabel("outer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, format="png")


def _draw(axes, entries: list[dict], name: str, label: str, **style) -> None:
    points = [(entry["step"], entry[name]) for entry in entries if name in entry]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, marker=".", markersize=3, **style)
