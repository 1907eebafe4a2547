"""Long texts that are on every machine with Python, to try the page with."""

import importlib.util
from pathlib import Path


def texts_there() -> dict[str, str]:
    """Texts of the standard library by name: its manual's reference and two modules, as far as they are installed."""
    found = {}
    topics = importlib.util.find_spec("pydoc_data")
    if topics is not None:
        from pydoc_data.topics import topics as pages

        found["Python's reference (prose)"] = "\n\n".join(pages.values())
    for name, module in (("argparse.py (code)", "argparse"), ("_pydecimal.py (code)", "_pydecimal")):
        source = importlib.util.find_spec(module)
        if source is not None and source.has_location:
            found[name] = Path(source.origin).read_text(encoding="utf-8")
    return found
