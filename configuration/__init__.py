"""Presets as data: tables of model sizes and of compared systems, a file per recipe and experiment, with loaders."""

from .demo_recipe import DemoRecipe, load_demo_recipe
from .presets import load_config, load_preset, preset_description, preset_names, system_preset
from .recipes import DataRecipe, Recipe, load_recipe, recipe_description, recipe_names
from .systems import System, load_systems

__all__ = [
    "DataRecipe",
    "DemoRecipe",
    "Recipe",
    "System",
    "load_config",
    "load_demo_recipe",
    "load_preset",
    "load_recipe",
    "load_systems",
    "preset_description",
    "preset_names",
    "recipe_description",
    "recipe_names",
    "system_preset",
]
