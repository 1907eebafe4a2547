"""Use of a trained model: learned contexts as folders, writing from them, conversations, and a server.

`serving.server` is imported by its own name, because it needs the packages of the extra `serve`.
"""

from .contexts import ContextFolder, ReadDocument, StoredContext, check_room, open_context, write_context
from .conversation import Answer, Conversation, Turns
from .documents import document_name, document_text, read_documents, text_tokens
from .many_documents import ManyDocuments, Outcome, ReadingRequest
from .models import TextModel, load_text_model
from .writing import write, writing_arguments

__all__ = [
    "Answer",
    "ContextFolder",
    "Conversation",
    "ManyDocuments",
    "Outcome",
    "ReadDocument",
    "ReadingRequest",
    "StoredContext",
    "TextModel",
    "Turns",
    "check_room",
    "document_name",
    "document_text",
    "load_text_model",
    "open_context",
    "read_documents",
    "text_tokens",
    "write",
    "write_context",
    "writing_arguments",
]
