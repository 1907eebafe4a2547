"""Official checkpoints become folders of transformers and go back, bit for bit; what is wrong leaves nothing behind."""

import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ttt_e2e import TTTE2EForCausalLM
from ttt_e2e.conversion import official_checkpoint, weight_files
from ttt_e2e.conversion.official_checkpoint import convert_official, export_official, official_config
from ttt_e2e.conversion.orbax import OrbaxReader, find_weights
from ttt_e2e.conversion.remote_folder import open_folder

from ..modeling.golden import Golden
from ..modeling.helpers import small_model
from .official import CHECKPOINT, changed_tree, converted, official_file, official_groups, words_tokenizer

pytest.importorskip("tensorstore")

LN_F = "('language_model', 'model', 'ln_f', 'weight')"
WEIGHTS = CHECKPOINT / "0" / "model_weights"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The converted checkpoint; not to be changed."""
    return converted(tmp_path_factory.mktemp("tiny"))


def refused(folder: Path, error: type[Exception], message: str, **changes) -> None:
    """Converting with `changes` raises, and leaves the folder as it was."""
    arguments = {"checkpoint": str(CHECKPOINT), "size": official_file(folder / "size"), "output": folder / "model"}
    before = sorted(folder.rglob("*"))
    with pytest.raises(error, match=message):
        convert_official(**arguments | changes)
    assert sorted(folder.rglob("*")) == before


# -------------------------------------------------------------------------------------------------------- what it gives


def test_the_converted_checkpoint_computes_the_official_numbers(tiny):
    golden = Golden("micro_adamw_steps")
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        outputs = model(golden.ids, labels=golden.ids)
    losses = golden.loss(outputs.token_nll)
    torch.testing.assert_close(outputs.token_nll, golden["out.token_nll"], rtol=0, atol=5e-5)
    torch.testing.assert_close(outputs.inner_loss, golden["out.chunk_loss"], rtol=0, atol=1e-5)
    torch.testing.assert_close(losses, golden["out.loss_per_sequence"], rtol=0, atol=1e-5)


def test_the_folder_is_the_one_that_save_pretrained_writes(tiny, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path)
    assert {path.name for path in tiny.iterdir()} == {path.name for path in tmp_path.iterdir()}
    assert json.loads((tiny / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())
    ours, theirs = (GenerationConfig.from_pretrained(folder).to_dict() for folder in (tiny, tmp_path))
    assert ours == theirs
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tiny, tmp_path))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("part", ["", "0", "0/model_weights"])
def test_root_step_and_weights_give_the_same_model(tiny, tmp_path, part):
    read = convert_official(str(CHECKPOINT / part), official_file(tmp_path), tmp_path / "model")
    assert read == str(WEIGHTS)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_shards_load_and_hold_no_more_than_asked_for(tiny, tmp_path):
    folder = converted(tmp_path, max_shard_size="5KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("model-*.safetensors"))
    shards = {path.name: load_file(path) for path in files}
    assert len(files) > 2 and not (folder / "model.safetensors").exists()
    assert {name: file for file, tensors in shards.items() for name in tensors} == index["weight_map"]
    sizes = {file: sum(tensor.nbytes for tensor in tensors.values()) for file, tensors in shards.items()}
    assert max(sizes.values()) <= 5000 and sum(sizes.values()) == index["metadata"]["total_size"]
    one, other = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny, folder))
    assert index["metadata"]["total_parameters"] == one.num_parameters()
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_no_read_is_larger_than_a_layers_tensor_and_no_more_than_a_shard_is_held(tmp_path, monkeypatch):
    reads, held, written = [], [0], []
    read, save, convert = OrbaxReader._read, weight_files.save_file, official_checkpoint.tensor_from_official

    def counted_read(self, part, name):
        reads.append((name, part.size))
        return read(self, part, name)

    def counted_convert(*arguments):
        one = convert(*arguments)
        held[0] += one.nbytes
        assert held[0] <= 5000, "more than a shard"
        return one

    def counted_save(tensors, *arguments, **settings):
        held[0] -= sum(tensor.nbytes for tensor in tensors.values())
        written.append(len(tensors))
        return save(tensors, *arguments, **settings)

    monkeypatch.setattr(OrbaxReader, "_read", counted_read)
    monkeypatch.setattr(official_checkpoint, "tensor_from_official", counted_convert)
    monkeypatch.setattr(weight_files, "save_file", counted_save)
    converted(tmp_path, max_shard_size="5KB")
    layers = {name: shape for name, shape in OrbaxReader(WEIGHTS).shapes.items() if ".h." in name}
    assert len(reads) == sum(shape[0] for shape in layers.values()) + 2 == sum(written)
    for name, size in reads:
        whole = torch.Size(OrbaxReader(WEIGHTS).shapes[name]).numel()
        assert size == (whole // layers[name][0] if name in layers else whole)


def test_bfloat16_is_the_rounded_float32(tiny, tmp_path):
    folder = converted(tmp_path, dtype="bfloat16")
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    exact, rounded = (load_file(path / "model.safetensors") for path in (tiny, folder))
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in exact.items())


def test_the_tokenizer_is_saved_with_the_model(tmp_path):
    words_tokenizer(61).save_pretrained(tmp_path / "tokenizer")
    folder = converted(tmp_path, tokenizer=str(tmp_path / "tokenizer"))
    assert AutoTokenizer.from_pretrained(folder)("w5 w60")["input_ids"] == [5, 60]
    assert AutoConfig.from_pretrained(folder).pad_token_id == 0
    assert GenerationConfig.from_pretrained(folder).pad_token_id == 0


def test_presets_are_sizes():
    for size, layers in {"125m": 12, "350m": 24, "760m": 24, "1b": 24, "3b": 32}.items():
        assert official_config(size).num_hidden_layers == layers


def test_a_folder_elsewhere_is_downloaded_and_the_copy_removed(tiny, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(f"{CHECKPOINT}/", "/bucket/tiny/", recursive=True)
    try:
        read = convert_official("memory://bucket/tiny", official_file(tmp_path), tmp_path / "model")
        assert read.endswith("bucket/tiny/0/model_weights")
        lacking = memory.cat_file(read + "/_METADATA").replace(b'"ln_f"', b'"ln_g"')
        memory.pipe_file(read + "/_METADATA", lacking)
        refused(tmp_path, ValueError, r"lack.*ln_f", checkpoint="memory://bucket/tiny", output=tmp_path / "other")
    finally:
        memory.rm("/bucket", recursive=True)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == sorted(p.name for p in tiny.iterdir())
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


# --------------------------------------------------------------------------------------------------------- the way back


def test_the_round_trip_is_bit_identical(tiny, tmp_path):
    export_official(tiny, tmp_path / "official")
    original, written = OrbaxReader(WEIGHTS), OrbaxReader(tmp_path / "official" / "0" / "model_weights")
    assert written.shapes == original.shapes and written.dtypes == original.dtypes
    assert all(torch.equal(written.read(name), original.read(name)) for name in original.shapes)
    tree = [json.loads((r.folder / "_METADATA").read_text())["tree_metadata"] for r in (original, written)]
    assert tree[0] == tree[1], "the empty leaves included"

    convert_official(str(tmp_path / "official"), str(tmp_path / "official" / "config.json"), tmp_path / "again")
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tiny / file).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False, "use_prime_mlp": False},
        {"layer_types": ["full_attention"] * 4, "num_suffix_layers": 0, "test_time_training": False},
        {"qk_norm": False, "post_norm": False},
    ],
    ids=["untied-no-prime", "full-attention", "no-norms"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_of_ours_come_back_as_they_were(tmp_path, changes, dtype):
    model = small_model(dtype, **changes)
    model.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    export_official(tmp_path / "model", tmp_path / "official")
    groups = json.loads((tmp_path / "official" / "config.json").read_text())
    assert groups["model"]["param_dtype"] == {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    name = str(dtype).removeprefix("torch.")
    size = str(tmp_path / "official" / "config.json")
    convert_official(str(tmp_path / "official"), size, tmp_path / "again", dtype=name)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.dtype == dtype
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "no weights in it"),
        (lambda f: (f / "model.safetensors").write_bytes(b"{}"), ValueError, "model.safetensors is damaged"),
        (lambda f: replace_by_index(f, {"weight_map": [1]}), ValueError, "index.json is damaged"),
        (lambda f: change_tensors(f, drop="model.norm.weight"), ValueError, "model.norm.weight.*missing"),
        (lambda f: change_tensors(f, extra=torch.ones(2)), ValueError, r"`extra` has shape \(2,\).*no such tensor"),
        (lambda f: change_tensors(f, dtype=torch.float16), ValueError, "float16; all.*dtype=torch.float32"),
        (lambda f: change_config(f, hidden_act="gelu"), ValueError, "hidden_act.*gelu.*silu"),
        (lambda f: change_config(f, use_attention=False), ValueError, "use_attention.* False, .* needs True"),
        (lambda f: change_config(f, inner_projections="down"), ValueError, "inner_projections.* down, .* needs 'all'"),
        (lambda f: change_config(f, model_type="llama"), ValueError, "llama model; only ttt_e2e"),
    ],
    ids=[
        "no-config",
        "no-weights",
        "damaged",
        "damaged-index",
        "missing",
        "extra",
        "float16",
        "inexpressible",
        "no-attention",
        "down",
        "other-model",
    ],
)
def test_models_without_an_official_form_are_refused(tiny, tmp_path, damage, error, message):
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    damage(folder)
    with pytest.raises(error, match=message):
        export_official(folder, tmp_path / "official")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def change_tensors(folder: Path, drop: str = "", dtype: torch.dtype = torch.float32, **extra) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(
        {name: tensor for name, tensor in (tensors | extra).items() if name != drop}, folder / "model.safetensors"
    )


def replace_by_index(folder: Path, index: dict) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    refused(tmp_path, FileNotFoundError, "nowhere.*no such folder", checkpoint=str(tmp_path / "nowhere"))
    refused(tmp_path, ValueError, "no Orbax checkpoint", checkpoint=str(CHECKPOINT.parent))
    refused(tmp_path, ValueError, "opt_state", checkpoint=str(CHECKPOINT / "0" / "opt_state"))


def test_missing_and_extra_tensors_are_named(tmp_path):
    missing = changed_tree(tmp_path / "missing", lambda tree: tree.pop(LN_F))
    refused(tmp_path, ValueError, r"lack.*ln_f\.weight", checkpoint=str(missing))
    size = official_file(tmp_path / "s", prime=False)
    refused(tmp_path, ValueError, r"hold.*feed_forward_prime\.w1\.weight.*no place", size=size)


def test_a_size_that_does_not_fit_says_where(tmp_path):
    size = official_file(tmp_path / "wide", intermediate_size=32)
    message = r"`intermediate_size` is 24 .* but 32 .*w1\.weight` has shape \(3, 16, 24\).*needs \(3, 16, 32\)"
    refused(tmp_path, ValueError, message, size=size)
    refused(tmp_path, ValueError, r"'125m'.*`vocab_size` is 61 .* but 128256 .*`num_hidden_layers` is 3", size="125m")


def test_the_sizes_that_fit_are_named(tmp_path):
    config = official_config("tiny")
    config.vocab_size = 64
    TTTE2EForCausalLM(config).save_pretrained(tmp_path / "model")
    export_official(tmp_path / "model", tmp_path / "official")
    size = json.loads((tmp_path / "official" / "config.json").read_text())
    assert size["model"]["vocab_size"] == 64
    shapes = OrbaxReader(Path(find_weights(*open_folder(str(tmp_path / "official"))[:2]))).shapes
    shapes["language_model.model.wte.weight"] = (official_config("tiny").vocab_size, config.hidden_size)
    with pytest.raises(ValueError, match=r"size='125m'.*fitting are tiny$"):
        official_checkpoint._check_fits(shapes, official_config("125m"), "125m")


def test_tensors_of_another_rank_are_refused():
    shapes = OrbaxReader(WEIGHTS).shapes | {"language_model.model.wte.weight": (61,)}
    with pytest.raises(ValueError, match=r"wte.weight` has shape \(61,\)"):
        official_checkpoint._check_fits(shapes, official_config("125m"), "125m")


@pytest.mark.parametrize(("size", "nearest"), [("126m", "125m"), ("3B", "3b"), ("760", "760m")])
def test_an_unknown_size_suggests_the_nearest(tmp_path, size, nearest):
    refused(tmp_path, ValueError, f"size='{size}' is unknown; did you mean '{nearest}'", size=size)


def test_a_wrong_configuration_names_the_field(tmp_path):
    groups = official_groups()
    del groups["model"]["suffix_len"]
    for name, contents in {"lacks": groups, "other": {"model_type": "llama"}, "list": [1]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(contents))
    refused(tmp_path, FileNotFoundError, "none.json.*no such file", size=str(tmp_path / "none.json"))
    refused(tmp_path, ValueError, "'suffix_len' is missing", size=str(tmp_path / "lacks.json"))
    refused(tmp_path, ValueError, "'model' is missing", size=str(tmp_path / "other.json"))
    refused(tmp_path, ValueError, "list.json", size=str(tmp_path / "list.json"))
    refused(tmp_path, ValueError, "hidden_size", size=official_file(tmp_path / "typed", hidden_size="wide"))
    refused(tmp_path, ValueError, "output_size.*32000", size=official_file(tmp_path / "head", output_size=32000))


def test_an_output_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").touch()
    refused(tmp_path, ValueError, "model.*holds other files")
    with pytest.raises(ValueError, match="holds other files"):
        export_official(tmp_path, tmp_path / "model")
    refused(tmp_path, ValueError, "holds other files", output=tmp_path / "model" / "mine.txt")
    (tmp_path / "empty").mkdir()
    convert_official(str(CHECKPOINT), official_file(tmp_path / "size"), tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_full_disk_is_noticed_before_any_work(tiny, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(0, 0, 1000)
    monkeypatch.setattr("ttt_e2e.storage.disk.shutil.disk_usage", lambda path: usage)
    refused(tmp_path, OSError, "converted model needs .* only 1000 left")
    with pytest.raises(OSError, match="official checkpoint needs"):
        export_official(tiny, tmp_path / "official")
    assert not (tmp_path / "official").exists()


def test_a_tokenizer_must_fit_the_vocabulary(tmp_path, monkeypatch):
    words_tokenizer(62).save_pretrained(tmp_path / "large")
    refused(tmp_path, ValueError, "ids go up to 61.*only 0 to 60", tokenizer=str(tmp_path / "large"))
    refused(tmp_path, FileNotFoundError, "no tokenizer in it", tokenizer=str(tmp_path))
    words_tokenizer(61, bos=3).save_pretrained(tmp_path / "other")
    warnings = []
    monkeypatch.setattr(official_checkpoint.logger, "warning", warnings.append)
    converted(tmp_path / "size", tokenizer=str(tmp_path / "other"))
    assert len(warnings) == 1 and "bos_token_id is 3, but the checkpoint was trained with 1" in warnings[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float64"}, "dtype='float64'.*float32, bfloat16"),
        ({"max_shard_size": "5 apples"}, "max_shard_size='5 apples'"),
        ({"project": "mine"}, "project='mine'.*gs://"),
        ({"checkpoint": "nothing://bucket/x"}, "nothing://bucket/x.*gs://bucket/path"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, changes, message):
    refused(tmp_path, ValueError, message, **changes)


def test_google_storage_names_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    refused(tmp_path, ImportError, "pip install gcsfs", checkpoint="gs://bucket/125m")

    class Closed(fsspec.AbstractFileSystem):
        def ls(self, path, detail=True, **kwargs):
            raise PermissionError("Bucket is a requester pays bucket but no user project provided.")

        def info(self, path, **kwargs):
            self.ls(path)

    monkeypatch.setattr(
        "ttt_e2e.conversion.remote_folder.url_to_fs", lambda address, **options: (Closed(), "bucket/125m")
    )
    refused(tmp_path, OSError, "requester-pays.*--project", checkpoint="gs://bucket/125m")


def test_the_project_that_pays_reaches_the_file_system(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "ttt_e2e.conversion.remote_folder.url_to_fs",
        lambda address, **options: seen.update(options) or (fsspec.filesystem("file"), str(CHECKPOINT)),
    )
    open_folder("gs://bucket/125m", "mine")
    assert seen == {"requester_pays": "mine"}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_nothing(tiny, tmp_path, monkeypatch, error):
    def fails(*arguments, **settings):
        raise error

    size = official_file(tmp_path / "size")
    monkeypatch.setattr(weight_files, "save_file", fails)
    monkeypatch.setattr(official_checkpoint, "write_metadata", fails)
    with pytest.raises(type(error)):
        convert_official(str(CHECKPOINT), size, tmp_path / "model")
    with pytest.raises(type(error)):
        export_official(tiny, tmp_path / "official")
    assert [path.name for path in tmp_path.iterdir()] == ["size"]
