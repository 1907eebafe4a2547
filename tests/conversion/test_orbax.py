"""Arrays of an Orbax checkpoint: what the official checkpointer wrote is read, and written the same again."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file

from ttt_e2e.conversion.orbax import OrbaxReader, find_weights, write_array, write_metadata

pytest.importorskip("tensorstore")

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT = GOLDEN / "official_orbax_tiny"
WEIGHTS = CHECKPOINT / "0" / "model_weights"
W1 = "language_model.model.h.blocks.feed_forward.w1.weight"
LN_F = "language_model.model.ln_f.weight"


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the official `model_weights`, to be damaged."""
    return Path(shutil.copytree(WEIGHTS, tmp_path / "0" / "model_weights"))


def found(path: Path) -> str:
    return find_weights(LocalFileSystem(), str(path))


def test_every_array_is_the_official_one():
    tensors = load_file(GOLDEN / "micro_adamw_steps.safetensors")
    expected = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
    reader = OrbaxReader(WEIGHTS)
    assert reader.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert set(reader.dtypes.values()) == {"float32"}
    for name, tensor in expected.items():
        assert torch.equal(reader.read(name), tensor)
        assert torch.equal(torch.stack(list(reader.slices(name))), tensor)


def test_slices_are_read_one_at_a_time(monkeypatch):
    sizes, read = [], OrbaxReader._read
    monkeypatch.setattr(
        OrbaxReader, "_read", lambda self, part, name: sizes.append(part.size) or read(self, part, name)
    )
    slices = OrbaxReader(WEIGHTS).slices(W1)
    next(slices)
    assert sizes == [16 * 24], "nothing beyond what was asked for"
    assert len(list(slices)) == 2 and sizes == [16 * 24] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stacked", [True, False])
def test_written_arrays_are_read_back_bit_for_bit(tmp_path, dtype, stacked):
    tensor = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[1] = 0  # a slice of zeros is stored like any other
    tensor[2, 0, 0], tensor[2, 0, 1] = float("nan"), -0.0
    write_array(tmp_path / "w", "a.b", (3, 4, 5), dtype, tensor if stacked else [tensor], stacked=stacked)
    write_metadata(tmp_path / "w", {"a.b": (3, 4, 5)}, ["a.c"])
    reader = OrbaxReader(tmp_path / "w")
    assert reader.shapes == {"a.b": (3, 4, 5)}
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(reader.read("a.b").view(bits), tensor.view(bits))
    assert torch.equal(torch.stack(list(reader.slices("a.b"))).view(bits), tensor.view(bits))
    assert reader.read("a.b").dtype == dtype


def test_written_metadata_is_what_orbax_writes(tmp_path):
    official = json.loads((WEIGHTS / "_METADATA").read_text())
    empty = [leaf for leaf in official["tree_metadata"].values() if leaf["value_metadata"]["value_type"] == "None"]
    names = [".".join(key["key"] for key in leaf["key_metadata"]) for leaf in empty]
    folder = tmp_path / "0" / "model_weights"
    folder.mkdir(parents=True)
    write_metadata(folder, OrbaxReader(WEIGHTS).shapes, names)
    assert json.loads((folder / "_METADATA").read_text()) == official
    assert json.loads((folder / "_sharding").read_text()) == json.loads((WEIGHTS / "_sharding").read_text())
    step, written = (json.loads((f / "_CHECKPOINT_METADATA").read_text()) for f in (CHECKPOINT / "0", tmp_path / "0"))
    assert step.keys() == written.keys()
    assert written["item_handlers"] == {"model_weights": step["item_handlers"]["model_weights"]}


def test_root_step_and_weights_are_the_same_checkpoint():
    assert found(CHECKPOINT) == found(CHECKPOINT / "0") == found(WEIGHTS) == str(WEIGHTS)


def test_the_newest_step_is_taken(tmp_path):
    for step in ("9", "10", "0100.orbax-checkpoint-tmp-7"):
        shutil.copytree(WEIGHTS, tmp_path / step / "model_weights")
    assert found(tmp_path) == str(tmp_path / "10" / "model_weights")
    (tmp_path / "11").mkdir()
    with pytest.raises(ValueError, match=r"newest step, .*11, holds no model_weights"):
        found(tmp_path)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*no such folder"):
        found(tmp_path / "nowhere")
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match=r"no Orbax checkpoint.*_METADATA"):
        found(tmp_path)


def test_an_unfinished_copy_is_refused(copy):
    (copy / "manifest.ocdbt").unlink()
    with pytest.raises(ValueError, match=r"manifest\.ocdbt is missing"):
        found(copy)


@pytest.mark.parametrize("text", ["", "[]", '{"tree_metadata": {"a": {}}}'])
def test_damaged_metadata_is_refused(copy, text):
    (copy / "_METADATA").write_text(text)
    with pytest.raises(ValueError, match="_METADATA: not the metadata of an Orbax checkpoint"):
        OrbaxReader(copy)


def test_an_array_that_is_not_there_is_named(copy):
    text = (copy / "_METADATA").read_text()
    (copy / "_METADATA").write_text(text.replace('{"key": "ln_f", "key_type": 2}', '{"key": "ln_g", "key_type": 2}'))
    with pytest.raises(ValueError, match=r"ln_g\.weight` is named in _METADATA but cannot be opened") as refused:
        OrbaxReader(copy)
    assert "tensorstore_spec" not in str(refused.value)


def test_lost_data_is_an_error_and_never_zeros(copy, tmp_path):
    import tensorstore

    base = {"driver": "file", "path": f"{copy}/"}
    database = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    database.write(f"{LN_F}/0", None).result()
    with pytest.raises(ValueError, match=r"ln_f\.weight` cannot be read"):
        OrbaxReader(copy).read(LN_F)
    for file in (copy / "ocdbt.process_0" / "d").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="copy or download the checkpoint again"):
        list(OrbaxReader(copy).slices(W1))


def test_other_dtypes_are_refused(copy):
    import tensorstore

    kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{copy}/"}, "path": f"{LN_F}/"}
    spec = {"driver": "zarr", "kvstore": kvstore, "metadata": {"shape": [16]}, "dtype": "int32"}
    tensorstore.open(spec, create=True, delete_existing=True).result()
    with pytest.raises(ValueError, match=r"ln_f\.weight` is int32; only float32 and bfloat16"):
        OrbaxReader(copy)


def test_without_tensorstore_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ImportError, match="pip install tensorstore"):
        OrbaxReader(WEIGHTS)
