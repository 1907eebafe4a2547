"""Presets as data: one small YAML file per model size (`models/`) and per recipe (`recipes/`), and their loader."""

from .demo_recipe import DemoRecipe, load_demo_recipe
from .presets import load_preset, preset_description, preset_names
from .recipes import DataRecipe, Recipe, load_recipe, recipe_description, recipe_names

__all__ = [
    "DataRecipe",
    "DemoRecipe",
    "Recipe",
    "load_demo_recipe",
    "load_preset",
    "load_recipe",
    "preset_description",
    "preset_names",
    "recipe_description",
    "recipe_names",
]
