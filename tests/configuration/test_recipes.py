"""Recipes hold the paper's numbers, are merged in the documented order, and are read strictly."""

import pytest
import yaml

from ttt_e2e import TTTE2EConfig
from ttt_e2e.configuration import load_demo_recipe, load_preset, load_recipe, recipe_description, recipe_names

MINE = {
    "batch_size": 4,
    "model": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    "data": {"sequence_length": 64},
    "training": {"learning_rate": 0.1, "per_device_train_batch_size": 2},
    "by_model": {
        "small*": {"batch_size": 8, "training": {"learning_rate": 0.2}},
        "*-wide": {"training": {"learning_rate": 0.3}},
    },
}


def recipe_file(folder, **changes):
    path = folder / "mine.yaml"
    path.write_text("# mine\n" + yaml.safe_dump(MINE | changes, sort_keys=False))
    return str(path)


def test_recipes_are_those_of_training():
    assert recipe_names() == [
        "extend-128k",
        "extend-32k",
        "extend-packages",
        "pretrain-8k",
        "pretrain-packages",
        "pretrain-tiny",
        "warm-start",
        "widen-packages",
    ]


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("model", ["tiny", "760m", "3b-full-attention"])
def test_recipe_fits_the_models(name, model):
    recipe = load_recipe(name, model)
    assert recipe.name == name and recipe.description == recipe_description(name) != ""
    assert recipe.starts_from_saved == (not name.startswith("pretrain"))
    if name == "warm-start" and model.endswith("full-attention"):
        with pytest.raises(ValueError, match="there is nothing to learn with"):
            TTTE2EConfig(**(load_preset(model) | recipe.model))
    else:
        TTTE2EConfig(**(load_preset(model) | recipe.model))


@pytest.mark.parametrize(
    ("size", "rate", "steps", "batch", "billions", "extension_steps", "batch_32k", "batch_128k"),
    [
        ("125m", 3e-3, 4800, 64, 2.5, 120, 32, 8),
        ("350m", 1.5e-3, 13500, 64, 7, 337, 32, 8),
        ("760m", 1.25e-3, 29000, 64, 15, 725, 32, 8),
        ("1b", 1e-3, 50000, 64, 26, 1250, 32, 8),
        ("3b", 8e-4, 52000, 128, 54, 1300, 64, 16),
    ],
)
@pytest.mark.parametrize("twin", ["", "-sliding-window", "-full-attention"])
def test_numbers_of_the_paper(size, twin, rate, steps, batch, billions, extension_steps, batch_32k, batch_128k):
    """Table 3; tokens of pre-training within 2 %, those of an extension 5 % of them."""
    recipe = load_recipe("pretrain-8k", size + twin)
    assert (recipe.training["learning_rate"], recipe.training["max_steps"], recipe.batch_size) == (rate, steps, batch)
    tokens = steps * batch * recipe.data.sequence_length
    assert tokens == pytest.approx(billions * 1e9, rel=0.02)
    for name, rows in (("extend-32k", batch_32k), ("extend-128k", batch_128k)):
        recipe = load_recipe(name, size + twin)
        assert (recipe.training["learning_rate"], recipe.batch_size) == (4e-4, rows)
        assert recipe.training["max_steps"] == extension_steps
        assert extension_steps * rows * recipe.data.sequence_length == pytest.approx(0.05 * tokens, rel=0.01)


@pytest.mark.parametrize(
    ("name", "model", "theta"),
    [
        ("pretrain-8k", "3b-full-attention", 5e5),
        ("extend-32k", "3b-full-attention", 2e6),
        ("extend-128k", "3b-full-attention", 1e7),
        ("extend-128k", "3b-sliding-window", 5e5),
        ("extend-128k", "3b", 5e5),
    ],
)
def test_theta_grows_with_the_context_of_full_attention_only(name, model, theta):
    config = TTTE2EConfig(**(load_preset(model) | load_recipe(name, model).model))
    assert config.rope_parameters["rope_theta"] == theta
    assert config.max_position_embeddings >= load_recipe(name, model).data.sequence_length


def test_inner_learning_rate_grows_in_pretraining_and_not_in_the_extension():
    settings = [
        tuple(load_recipe(name, "3b").training[field] for field in ("inner_lr_init", "inner_lr_warmup_steps"))
        for name in ("pretrain-8k", "extend-32k", "extend-128k", "warm-start")
    ]
    assert settings == [(0.1, 0.1), (1.0, 0), (1.0, 0), (0.0, 0.1)]


def test_the_demo_trains_by_the_tiny_recipe():
    demo = load_demo_recipe().compared()
    assert demo.recipes == ["pretrain-tiny"] and demo.data == "standard-library"
    assert demo.validation_every == load_recipe("pretrain-tiny", "tiny").data.validation_every


def test_later_patterns_and_then_overrides_win(tmp_path):
    path = recipe_file(tmp_path)

    def rate(model, *overrides):
        recipe = load_recipe(path, model, overrides)
        return recipe.training["learning_rate"], recipe.batch_size

    assert rate("other") == (0.1, 4)
    assert rate("small") == (0.2, 8)
    assert rate("small-wide") == (0.3, 8)
    assert rate("small-wide", "training.learning_rate=5e-1", "batch_size=16") == (0.5, 16)


def test_a_file_may_change_a_built_in_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# Mine.\nbase: extend-packages\ntraining: {max_steps: 7}\n")
    ours, theirs = (load_recipe(name, "tiny") for name in (str(path), "extend-packages"))
    assert ours.training == theirs.training | {"max_steps": 7}
    assert (ours.name, ours.description, ours.data) == ("mine", "Mine.", theirs.data)
    path.write_text("base: pretrain-8k\ntraining: {learning_rate: 0.5}\nby_model: {3b: {batch_size: 7}}\n")
    for model, size in (("125m", 64), ("350m", 64), ("3b", 7)):
        recipe = load_recipe(str(path), model)
        # Also where the base tells models apart.
        assert (recipe.training["learning_rate"], recipe.batch_size) == (0.5, size)
        assert recipe.training["max_steps"] == load_recipe("pretrain-8k", model).training["max_steps"]


def test_mistaken_bases_are_named(tmp_path):
    path, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    path.write_text("base: extend-9k\n")
    with pytest.raises(ValueError, match=r"name='extend-9k': no such recipe; choose one of .*extend-32k"):
        load_recipe(str(path), "tiny")
    path.write_text("base: 3\n")
    with pytest.raises(ValueError, match=r"mine.yaml: base=3 must be the name of a recipe"):
        load_recipe(str(path), "tiny")
    path.write_text(f"base: {other}\n")
    other.write_text(f"base: {path}\n")
    with pytest.raises(ValueError, match=r"other.yaml: base=.* goes on from this file"):
        load_recipe(str(path), "tiny")
    other.write_text("base: pretrain-8k\ntraining: {lerning_rate: 1}\n")
    with pytest.raises(ValueError, match=r"other.yaml, section training: unknown field 'lerning_rate'"):
        load_recipe(str(path), "tiny")


def test_overrides_are_yaml_and_reach_into_mappings(tmp_path):
    overrides = ["model.rope_parameters.rope_theta=2e6", "data.streaming=true", "data.validation_every=null"]
    recipe = load_recipe(recipe_file(tmp_path), "other", [*overrides, "training.lr_scheduler_kwargs={min_lr: -1E-5}"])
    assert recipe.model == {"rope_parameters": {"rope_type": "default", "rope_theta": 2e6}}
    assert recipe.data.streaming is True and recipe.data.validation_every is None
    assert recipe.training["lr_scheduler_kwargs"] == {"min_lr": -1e-5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lerning_rate=1", r"did you mean 'training.learning_rate'"),
        ("traning.learning_rate=1", r"did you mean 'training.learning_rate'"),
        ("learning_rate=1", r"did you mean 'training.learning_rate'"),
        ("model.hiden_size=8", r"did you mean 'model.hidden_size'"),
        ("data.sequence_lenght=8", r"did you mean 'data.sequence_length'"),
        ("batch_size", r"override 'batch_size' must be FIELD=VALUE"),
        ("=8", r"must be FIELD=VALUE"),
        ("batch_size=", r"must be FIELD=VALUE.*null for no value"),
        ("batch_size=[8", r"override 'batch_size=\[8' is not valid YAML"),
        ("batch_size=8.5", r"'batch_size' expected int, got float"),
        ("data.streaming=yess", r"'streaming' expected bool, got str"),
        ("training.learning_rate=fast", r"section training: .*'learning_rate' expected float, got str"),
        ("training.learning_rate.x=1", r"'learning_rate' expected float, got dict"),
        ("training.inner_lr_init=low", r"'inner_lr_init' expected float, got str"),
        ("model.hidden_size=8.5", r"section model: .*'hidden_size' expected int, got float"),
        ("batch_size=0", r"batch_size=0 must be at least 1"),
        ("batch_size=3", r"batch_size=3 cannot be spread .* training.per_device_train_batch_size=2 rows"),
        ("data.validation_every=1", r"data.validation_every=1 must be at least 2"),
        ("training.gradient_accumulation_steps=2", r"cannot be set in a recipe: .*set batch_size"),
        ("training.output_dir=here", r"cannot be set in a recipe: give the folder"),
    ],
)
def test_mistaken_overrides_are_named(tmp_path, override, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_recipe(recipe_file(tmp_path), "other", [override])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainin": {}}, r"mine.yaml: unknown field 'trainin'; did you mean 'training'"),
        ({"data": {"sequence_lenght": 8}}, r"section data: unknown field 'sequence_lenght'; did you mean"),
        ({"data": {"streaming": True}}, r"section data: missing field 'sequence_length'"),
        ({"model": {"hiden_size": 8}}, r"section model: unknown field 'hiden_size'; did you mean 'hidden_size'"),
        ({"training": {"lerning_rate": 1}}, r"section training: unknown field 'lerning_rate'; did you mean"),
        ({"training": {"output_dir": "here"}}, r"section training: output_dir cannot be set in a recipe"),
        ({"training": 5}, r"section training must hold a mapping of fields to values, but holds 5"),
        ({"batch_size": "8"}, r"'batch_size' expected int, got str"),
        ({"by_model": {"no-such": {"batch_sise": 8}}}, r"by_model 'no-such': unknown field 'batch_sise'"),
        ({"by_model": ["3b"]}, r"by_model must hold a mapping"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_recipe(recipe_file(tmp_path, **changes), "other")


def test_batch_size_is_required(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {sequence_length: 8}\n")
    with pytest.raises(ValueError, match="missing field 'batch_size'"):
        load_recipe(str(path), "other")


def test_caller_decides_what_training_may_hold(tmp_path):
    path = recipe_file(tmp_path, training={"mine": 1}, by_model={})
    assert load_recipe(path, "other", ["training.mine=2"], training_fields=["mine"]).training == {"mine": 2}
    with pytest.raises(ValueError, match="unknown field 'mine'"):
        load_recipe(path, "other")


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(ValueError, match=r"name='pretrain-9k': no such recipe; choose one of .*pretrain-8k"):
        load_recipe("pretrain-9k", "125m")
