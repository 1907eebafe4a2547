"""Where the metrics of this package lie, for `evaluate.load`."""

from pathlib import Path

METRICS = Path(__file__).with_name("metrics")


def metric_path(name: str) -> str:
    """The folder of a metric, in a clone as in an installed wheel: `evaluate.load(metric_path("token_perplexity"))`.

    Args:
        name: `"token_perplexity"` or `"loss_by_position"`.

    Raises:
        ValueError: there is no metric of that name.
    """
    names = sorted(folder.name for folder in METRICS.iterdir() if (folder / f"{folder.name}.py").is_file())
    if name not in names:
        raise ValueError(f"name={name!r} is not a metric of this package; give one of {', '.join(names)}")
    return str(METRICS / name)
