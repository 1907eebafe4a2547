"""One way from the name of a model (preset, YAML file, folder, run, checkpoint, id of the Hub) to the model itself."""

from .sources import ModelSource, check_saved, find_model, find_saved_model, model_label, weight_files
from .weights import chosen_device, in_fast_dtype, load_model, load_saved, on_device

__all__ = [
    "ModelSource",
    "check_saved",
    "chosen_device",
    "find_model",
    "find_saved_model",
    "in_fast_dtype",
    "load_model",
    "load_saved",
    "model_label",
    "on_device",
    "weight_files",
]
