"""A warm start on the disk: exact, whole or not at all, and refused before any work where it cannot be."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen2Config

from ttt_e2e import TTTE2EForCausalLM
from ttt_e2e.conversion import pretrained, warm_start, weight_files
from ttt_e2e.conversion.transformer_layout import WarmStartSettings, warm_started_model
from ttt_e2e.conversion.warm_start import WarmStartRequest, prepare_warm_start, write_warm_start

from ..modeling.helpers import random_ids
from ..modeling.tiny_tokenizer import byte_level_tokenizer
from .pretrained import SETTINGS, SOURCES, assert_same, random_source

IDS = random_ids(2, 30)


def save_source(folder, kind="llama", dtype=torch.float32, max_shard_size="5GB"):
    """A random source, with a generation configuration and a tokenizer that has a chat template."""
    config_class, changes = SOURCES[kind]
    source = random_source(config_class, changes | {"vocab_size": 300}).to(dtype)
    source.generation_config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=[2, 5])
    source.save_pretrained(folder, max_shard_size=max_shard_size)
    byte_level_tokenizer().save_pretrained(folder)
    return source


def convert(model, output, settings=SETTINGS, **changes):
    write_warm_start(prepare_warm_start(WarmStartRequest(str(model), output, settings, **changes)))


def load(folder) -> TTTE2EForCausalLM:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is TTTE2EForCausalLM
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


@pytest.mark.parametrize(
    "kind", ["llama", "llama, tied", "mistral, sliding", "qwen2, tied, yarn", "qwen3, tied, biases"]
)
@pytest.mark.parametrize("size", ["5GB", "20KB"], ids=["one file", "shards"])
@torch.no_grad()
def test_the_new_folder_computes_what_the_source_computes(tmp_path, kind, size):
    source = save_source(tmp_path / "source", kind, max_shard_size=size)
    convert(tmp_path / "source", tmp_path / "new", max_shard_size=size)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1 or size == "5GB"
    model = load(tmp_path / "new")
    assert_same(model(IDS, test_time_training=False).logits, source(IDS).logits)
    assert (model(IDS).logits - source(IDS).logits).abs().max() > 1e-3
    kept = warm_started_model(source, SETTINGS).state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_no_more_than_a_shard_is_in_memory(tmp_path, monkeypatch):
    save_source(tmp_path / "source", max_shard_size="30KB")
    sizes = []

    def save(tensors, path, metadata):
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, path, metadata)

    monkeypatch.setattr(weight_files, "save_file", save)
    convert(tmp_path / "source", tmp_path / "new", max_shard_size=50_000)
    assert len(sizes) > 2 and max(sizes) <= 50_000
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_tokenizer_template_and_generation_configuration_are_carried_over(tmp_path, kind):
    source = save_source(tmp_path / "source", kind)
    convert(tmp_path / "source", tmp_path / "new")
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("source", "new")]
    chat = [{"role": "user", "content": "where does the river go?"}]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for tokenizer in tokenizers]
    assert texts[0] == texts[1] and tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    model = load(tmp_path / "new")
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.7, [2, 5])
    arguments = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(IDS[:1], learn_from="none", **arguments), source.generate(IDS[:1], **arguments))


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_the_dtype_is_that_of_the_source_unless_another_is_named(tmp_path, dtype):
    source = save_source(tmp_path / "source", "qwen2", dtype=torch.bfloat16)
    convert(tmp_path / "source", tmp_path / "new", dtype=dtype)
    expected = torch.float32 if dtype == "float32" else torch.bfloat16
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    name = "model.layers.3.mlp.down_proj.weight"
    assert torch.equal(tensors[name], source.get_parameter(name).to(expected))
    assert load(tmp_path / "new").dtype == expected


@torch.no_grad()
def test_a_head_that_only_the_configuration_ties_is_kept(tmp_path):
    save_source(tmp_path / "source", "llama, tied")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    for same in (True, False):
        head = tensors["model.embed_tokens.weight"].clone() if same else torch.randn(300, 32)
        save_file(tensors | {"lm_head.weight": head}, tmp_path / "source" / "model.safetensors", {"format": "pt"})
        convert(tmp_path / "source", tmp_path / str(same))
        model, source = load(tmp_path / str(same)), AutoModelForCausalLM.from_pretrained(tmp_path / "source")
        assert model.config.tie_word_embeddings == same
        assert_same(model(IDS, test_time_training=False).logits, source(IDS).logits)


def test_a_tokenizer_that_would_become_another_one_is_refused(tmp_path, monkeypatch):
    save_source(tmp_path / "source")
    start = prepare_warm_start(WarmStartRequest(str(tmp_path / "source"), tmp_path / "new", SETTINGS))
    start.source.tokenizer.add_tokens("river")
    other = AutoTokenizer.from_pretrained(tmp_path / "source")
    monkeypatch.setattr(warm_start, "load_tokenizer", lambda folder: other)
    with pytest.raises(ValueError, match="is loaded as a different"):
        write_warm_start(start)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_without_tokenizer_gives_a_model_without(tmp_path):
    save_source(tmp_path / "source")
    for path in (tmp_path / "source").glob("*token*"):
        path.unlink()
    assert (
        prepare_warm_start(WarmStartRequest(str(tmp_path / "source"), tmp_path / "new", SETTINGS)).source.tokenizer
        is None
    )
    (tmp_path / "new").mkdir()  # an empty folder will do
    convert(tmp_path / "source", tmp_path / "new")
    assert not list((tmp_path / "new").glob("*token*")) and load(tmp_path / "new")


def test_a_model_of_the_hub_is_checked_before_it_is_fetched(tmp_path, monkeypatch):
    save_source(tmp_path / "source")
    fields = json.loads((tmp_path / "source" / "config.json").read_text())
    fetched = []

    def fetch(name, allow_patterns):
        fetched.append(name)
        return str(tmp_path / "source")

    monkeypatch.setattr(pretrained, "snapshot_download", fetch)
    config = LlamaConfig(**fields)
    monkeypatch.setattr(warm_start, "find_source", lambda name, check: pretrained.Source(name, config, None, None))
    with pytest.raises(ValueError, match="`sliding_window` is missing"):
        convert("someone/llama", tmp_path / "new", WarmStartSettings())
    assert not fetched
    convert("someone/llama", tmp_path / "new")
    assert fetched == ["someone/llama"] and load(tmp_path / "new")


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    save_source(tmp_path / "source")
    (tmp_path / "new").mkdir()
    before = sorted(tmp_path.iterdir())

    def fail(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(weight_files, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "source", tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before and not list((tmp_path / "new").iterdir())
    monkeypatch.undo()
    (tmp_path / ".new.part").mkdir()  # of a process that was killed
    (tmp_path / ".new.part" / "rest").write_text("")
    convert(tmp_path / "source", tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before and not (tmp_path / "new" / "rest").exists()


# ---------------------------------------------------------------------------------------------------------- refusals


def damage_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def damage_tensors(folder, **changes):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: change for name, change in (tensors | changes).items() if change is not None}, path)


def drop_a_shard(folder):
    shutil.rmtree(folder)
    save_source(folder, max_shard_size="20KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


REFUSALS = {
    "architecture": (
        lambda f: damage_config(f, model_type="gemma3"),
        ValueError,
        "supported are llama, mistral, qwen2",
    ),
    "already": (lambda f: damage_config(f, model_type="ttt_e2e"), ValueError, "learns while it reads already"),
    "quantised": (
        lambda f: damage_config(f, quantization_config={"quant_method": "fp8"}),
        ValueError,
        r"quantised \(fp8\)",
    ),
    "integers": (
        lambda f: damage_tensors(f, **{"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
        ValueError,
        "model.norm.weight is saved as I8: quantised",
    ),
    "no head": (lambda f: damage_tensors(f, **{"lm_head.weight": None}), ValueError, "lacks lm_head.weight"),
    "another shape": (lambda f: damage_config(f, intermediate_size=40), ValueError, r"has shape \(48, 32\)"),
    "missing shard": (drop_a_shard, FileNotFoundError, "is missing, but model.safetensors.index.json names it"),
    "damaged": (cut_weights, ValueError, "model.safetensors is damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "no weights in it"),
    "no model": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json in it"),
    "no folder": (shutil.rmtree, FileNotFoundError, "there is no such folder"),
}


@pytest.mark.parametrize(("damage", "kind", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_sources_that_cannot_be_converted_are_refused(tmp_path, damage, kind, message):
    save_source(tmp_path / "source")
    damage(tmp_path / "source")
    with pytest.raises(kind, match=message):
        prepare_warm_start(WarmStartRequest(str(tmp_path / "source"), tmp_path / "new", SETTINGS))
    assert not [path for path in tmp_path.iterdir() if path.name != "source"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    save_source(tmp_path / "source")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "source").iterdir()}
    with pytest.raises(ValueError, match=r"holds other files: choose another folder. Nothing was overwritten"):
        convert(tmp_path / "source", tmp_path / "source")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "source").iterdir()} == before


def test_a_folder_below_the_home_is_checked_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_source(tmp_path / "source")
    with pytest.raises(ValueError, match="holds other files"):
        prepare_warm_start(WarmStartRequest(str(tmp_path / "source"), Path("~/source"), SETTINGS))


def test_a_full_disk_and_an_unknown_dtype_are_noticed_before_any_work(tmp_path, monkeypatch):
    save_source(tmp_path / "source")
    with pytest.raises(ValueError, match="dtype='int8': choose one of auto, float32"):
        convert(tmp_path / "source", tmp_path / "new", dtype="int8")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    with pytest.raises(OSError, match=r"the converted model needs .* bytes, but its disk has only 1000"):
        convert(tmp_path / "source", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path):
    save_source(tmp_path / "source")
    damage_tensors(tmp_path / "source", **{"model.norm.weight": torch.full((32,), 1e6)})
    with pytest.raises(ValueError, match=r"model.norm.weight: it has values that are not finite as torch.float16"):
        convert(tmp_path / "source", tmp_path / "new", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_old_configuration_is_understood(tmp_path):
    """Configurations of transformers 4 name the RoPE base and its scaling outside of `rope_parameters`."""
    config = {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"}
    random_source(
        Qwen2Config, {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}
    ).save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    fields = {
        name: value for name, value in json.loads(path.read_text()).items() if name not in ("rope_parameters", "dtype")
    }
    path.write_text(json.dumps(fields | config))
    convert(tmp_path / "source", tmp_path / "new")
    source, model = AutoModelForCausalLM.from_pretrained(tmp_path / "source"), load(tmp_path / "new")
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    with torch.no_grad():
        ids = random_ids(1, 40)
        assert_same(model(ids, test_time_training=False).logits, source(ids).logits)
