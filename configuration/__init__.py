"""Presets as data: one small YAML file per model size (`models/`) and per recipe (`recipes/`), and their loader."""

from .demo_recipe import DemoRecipe, load_demo_recipe
from .presets import load_preset, preset_description, preset_names

__all__ = ["DemoRecipe", "load_demo_recipe", "load_preset", "preset_description", "preset_names"]
