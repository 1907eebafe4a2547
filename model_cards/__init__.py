"""Model cards and folders for the Hub: a template, what fills it, the exporter, and the upload."""

from .card import ModelCardContents, ResultsSection, TrainingHistory, write_model_card
from .export import ExportRequest, prepare_export, refresh_export, write_export
from .push import check_push, push_folder

__all__ = [
    "ExportRequest",
    "ModelCardContents",
    "ResultsSection",
    "TrainingHistory",
    "check_push",
    "prepare_export",
    "push_folder",
    "refresh_export",
    "write_export",
    "write_model_card",
]
