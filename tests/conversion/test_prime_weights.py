"""New weights apart from their base: the same model again, on the base and on copies of it, and on nothing else."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Config
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from ttt_e2e.conversion import PrimeWeights, WarmStartRequest, prepare_warm_start, write_warm_start
from ttt_e2e.conversion.prime_weights import BASE_SKETCHES, PRIME_CONFIG, PRIME_WEIGHTS, is_new, merge_prime
from ttt_e2e.conversion.sketches import SIZE, distance, sketch
from ttt_e2e.evaluation.inner_learning_rate import Setting, SweepRequest, measure_sweep, prepare_sweep, write_settings
from ttt_e2e.loading import find_model, load_model

from ..modeling.helpers import random_ids
from ..modeling.tiny_tokenizer import byte_level_tokenizer
from .pretrained import SETTINGS, SOURCES, random_source

IDS = random_ids(2, 30)


def saved_source(folder, kind="llama, tied", seed=0, **changes):
    config_class, fields = SOURCES[kind]
    model = random_source(config_class, fields | {"vocab_size": 300} | changes, seed)
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return model


def converted(tmp_path, kind="llama, tied"):
    """A warm start on the disk, and the same model in memory with other new weights, as if it had been trained."""
    saved_source(tmp_path / "source", kind)
    write_warm_start(prepare_warm_start(WarmStartRequest(str(tmp_path / "source"), tmp_path / "start", SETTINGS)))
    model = load_model(find_model(tmp_path / "start"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_new(name):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def saved(tmp_path, kind="llama, tied", base="start"):
    model = converted(tmp_path, kind)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "start")
    PrimeWeights.of_model(model, str(tmp_path / base), tokenizer).save_pretrained(tmp_path / "new")
    tokenizer.save_pretrained(tmp_path / "new")
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", ["llama, tied", "llama", "qwen2", "qwen3", "llama, biases"])
@pytest.mark.parametrize("base", ["start", "source"])
def test_the_model_is_the_same_on_its_base_converted_or_not(tmp_path, kind, base):
    model = saved(tmp_path, kind, base)
    again = PrimeWeights.from_pretrained(tmp_path / "new").on_base()
    assert {**again.state_dict()}.keys() == {**model.state_dict()}.keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), logits(again)) and again.config.num_sink_tokens == model.config.num_sink_tokens


def test_an_inner_learning_rate_that_was_measured_is_written_where_it_is_read(tmp_path):
    saved(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("an old book is read and read again. " * 20)
    request = SweepRequest(
        model=str(tmp_path / "new"),
        data=str(tmp_path / "texts"),
        output=tmp_path / "out",
        cache=tmp_path / "cache",
        learning_rates=[0.5],
        write=True,
    )
    assert measure_sweep(prepare_sweep(request)) == 2
    write_settings(tmp_path / "new", Setting(0.5, 4))
    assert not (tmp_path / "new" / "config.json").exists()
    config = PrimeWeights.from_pretrained(tmp_path / "new").config
    assert (config.inner_learning_rate, config.mini_batch_size) == (0.5, 4)
    assert "_name_or_path" not in json.loads((tmp_path / "new" / PRIME_CONFIG).read_text())["config"]


def test_the_folder_holds_the_new_weights_only(tmp_path):
    model = saved(tmp_path)
    kept = load_file(tmp_path / "new" / PRIME_WEIGHTS)
    assert kept.keys() == {name for name, _ in model.named_parameters() if is_new(name)}
    assert not (tmp_path / "new" / "config.json").exists()


def test_commands_find_it_as_they_find_other_models(tmp_path):
    model = saved(tmp_path)
    source = find_model(tmp_path / "new")
    assert source.config_class is type(model.config) and source.folder == str(tmp_path / "new")
    assert torch.equal(logits(load_model(source)), logits(model))


def test_merged_it_is_a_plain_model(tmp_path):
    model = saved(tmp_path)
    merge_prime(tmp_path / "new", tmp_path / "merged", str(tmp_path / "source"))
    merged = load_model(find_model(tmp_path / "merged"))
    assert torch.equal(logits(merged), logits(model)) and AutoTokenizer.from_pretrained(tmp_path / "merged")
    with pytest.raises(FileExistsError, match="output="):
        merge_prime(tmp_path / "new", tmp_path / "merged")


def test_a_base_that_moved_is_named_by_the_caller(tmp_path):
    model = saved(tmp_path)
    (tmp_path / "start").rename(tmp_path / "elsewhere")
    weights = PrimeWeights.from_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match=r"base='.*start'.*write it into base_model_name_or_path of") as found:
        weights.on_base()
    assert "\n" not in str(found.value)
    assert torch.equal(logits(weights.on_base(tmp_path / "elsewhere")), logits(model))


def rounded(folder, share):
    """A copy of a source whose weights differ by `share` of their size."""
    file = folder / "model.safetensors"
    generator, tensors = torch.Generator().manual_seed(3), load_file(file)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensors[name] = tensor + share * noise * tensor.norm() / noise.norm()
    save_file(tensors, file, {"format": "pt"})


def test_a_quantised_copy_of_the_base_will_do_and_is_reported(tmp_path):
    saved(tmp_path, base="source")
    rounded(tmp_path / "source", 0.05)
    with CaptureLogger(logging.get_logger("ttt_e2e.conversion.prime_weights")) as heard:
        PrimeWeights.from_pretrained(tmp_path / "new").on_base()
    (reported,) = re.findall(r"relative distance ([\d.]+)", heard.out)
    assert 0.04 < float(reported) < 0.06


def test_another_model_is_no_base(tmp_path):
    saved(tmp_path, base="source")
    saved_source(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"another model.*relative distance of 1\.\d*.*at most 0\.1"):
        PrimeWeights.from_pretrained(tmp_path / "new").on_base(tmp_path / "other")
    rounded(tmp_path / "source", 0.15)
    with pytest.raises(ValueError, match=r"another model.*relative distance of 0\.1"):
        PrimeWeights.from_pretrained(tmp_path / "new").on_base()


def test_one_strange_tensor_is_enough(tmp_path):
    saved(tmp_path, base="source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"another model.*{name}: 1;"):
        PrimeWeights.from_pretrained(tmp_path / "new").on_base()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 301}, "`vocab_size` is 301, but .* 300"),
        ({"num_hidden_layers": 5}, "`num_hidden_layers` is 5"),
        ({"hidden_size": 64}, "`hidden_size` is 64"),
    ],
)
def test_a_base_of_another_shape(tmp_path, changes, message):
    saved(tmp_path)
    saved_source(tmp_path / "other", **changes)
    with pytest.raises(ValueError, match=message):
        PrimeWeights.from_pretrained(tmp_path / "new").on_base(tmp_path / "other")


def test_a_base_of_another_architecture(tmp_path):
    saved(tmp_path)
    random_source(Qwen2Config, {"vocab_size": 300, "tie_word_embeddings": True}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="`attention_bias` is True"):
        PrimeWeights.from_pretrained(tmp_path / "new").on_base(tmp_path / "other")


def test_a_base_with_another_vocabulary(tmp_path):
    saved(tmp_path)
    file = tmp_path / "start" / "tokenizer.json"
    file.write_text(file.read_text().replace('"!"', '"!?"', 1))
    with pytest.raises(ValueError, match="another vocabulary"):
        PrimeWeights.from_pretrained(tmp_path / "new").on_base()


@pytest.mark.parametrize("name", [PRIME_CONFIG, PRIME_WEIGHTS, BASE_SKETCHES])
def test_a_damaged_folder(tmp_path, name):
    saved(tmp_path)
    (tmp_path / "new" / name).write_bytes(b"{")
    with pytest.raises(ValueError, match="is damaged"):
        PrimeWeights.from_pretrained(tmp_path / "new")


def test_a_weight_that_is_missing(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / "new" / PRIME_WEIGHTS)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, tmp_path / "new" / PRIME_WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is missing"):
        PrimeWeights.from_pretrained(tmp_path / "new").on_base()


def test_a_folder_without_new_weights(tmp_path):
    saved_source(tmp_path / "source")
    with pytest.raises(FileNotFoundError, match=PRIME_CONFIG):
        PrimeWeights.from_pretrained(tmp_path / "source")


def test_the_record_says_what_the_base_is(tmp_path):
    saved(tmp_path)
    record = json.loads((tmp_path / "new" / PRIME_CONFIG).read_text())
    assert record["base_model_name_or_path"] == str(tmp_path / "start")


# ----------------------------------------------------------------------------------------------------------- sketches


@pytest.mark.parametrize("shape", [(1,), (SIZE,), (300, 700), (3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distances_of_sketches_are_those_of_the_tensors(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(shape, generator=generator).to(dtype)
    other = (one.float() + 0.07 * torch.randn(shape, generator=generator)).to(dtype)
    true = float((one.double() - other.double()).norm() / one.double().norm())
    found = distance([("a", other)], {"a": sketch(one)})
    assert found.relative == pytest.approx(true, rel=0.3) and found.largest == (found.relative, "a")
    assert distance([("a", one)], {"a": sketch(one)}).relative == 0


def test_a_sketch_does_not_depend_on_how_many_places_are_read_at_once(monkeypatch):
    tensor = torch.randn(5 * SIZE + 3, generator=torch.Generator().manual_seed(0))
    whole = sketch(tensor)
    monkeypatch.setattr("ttt_e2e.conversion.sketches.PART", 2 * SIZE)
    assert torch.allclose(sketch(tensor), whole, atol=1e-5)
