"""The one model that the server has, and the contexts that its clients may name."""

import json

from fastapi import HTTPException
from transformers.cli.serving.model_manager import ModelManager

from .contexts import ContextFolder, StoredContext
from .models import TextModel
from .requests import Fields

SEPARATOR = ":"
NO_MODEL = "model={!r}: there is no such model; there are {}"


class OneModel(ModelManager):
    """The model that is served, under its name; no other one is ever loaded.

    Args:
        name: what clients call it; contexts are listed as `name:context`.
    """

    def __init__(self, name: str, text_model: TextModel, contexts: ContextFolder):
        super().__init__(model_timeout=-1)
        self.name, self.text_model, self.contexts = name, text_model, contexts
        self.force_model = name

    def process_model_name(self, model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args, **kwargs):
        return self.text_model.model, self.text_model.tokenizer

    def ids(self) -> list[str]:
        """What clients may name as the model."""
        return [self.name, *(f"{self.name}{SEPARATOR}{context}" for context in self.contexts.names())]

    def list_models(self, cache_dir: str | None = None) -> list[dict]:
        entry = {"object": "model", "created": 0, "owned_by": "ttt-e2e", "status": {"value": "loaded"}}
        return [{"id": name, **entry} for name in self.ids()]

    async def load_model_streaming(self, model_id_and_revision: str, gguf_file: str | None = None):
        """What `transformers chat` asks first: whether the model is there. Nothing is loaded."""
        event = {"status": "ready", "model": model_id_and_revision, "cached": True}
        if model_id_and_revision not in self.ids():
            event = {"status": "error", "message": NO_MODEL.format(model_id_and_revision, ", ".join(self.ids()))}
        yield f"data: {json.dumps(event)}\n\n"

    def find_context(self, request: Fields) -> str | None:
        """The context that a request names: in the field `context`, or behind the model's name.

        Raises:
            HTTPException: 404 for an unknown model or context, 400 for two different ones.
        """
        wanted, context = request.model, request.context
        if wanted is not None and wanted != self.name:
            name, _, behind = wanted.partition(self.name + SEPARATOR)
            if name or not behind:
                raise HTTPException(404, NO_MODEL.format(wanted, ", ".join(self.ids())))
            if context not in (None, behind):
                raise HTTPException(400, f"model={wanted!r} and context={context!r}: name one context")
            context = behind
        names = self.contexts.names()
        if context is not None and context not in names:
            known = f"there are {', '.join(names)}" if names else "there are none"
            raise HTTPException(404, f"context={context!r}: there is no such learned context; {known}")
        return context

    def open_context(self, name: str) -> StoredContext:
        """The context of that name, for one request.

        Raises:
            HTTPException: 404 where it is gone, 400 where it is broken or belongs to other weights.
        """
        try:
            return self.contexts.open(name)
        except (KeyError, FileNotFoundError) as error:
            raise HTTPException(404, f"context={name!r}: there is no such learned context ({error})") from error
        except (ValueError, OSError) as error:
            raise HTTPException(400, f"context={name!r} cannot be used: {error}") from error
