"""Files and folders are there whole or not at all, and what was begun does not stay."""

import os

import pytest
import torch
from safetensors.torch import save_file

from ttt_e2e.storage.disk import folder_written_whole, write_text, written_whole


def test_a_file_that_was_not_finished_leaves_nothing(tmp_path):
    write_text(tmp_path / "file", "before")
    with pytest.raises(OSError, match="disk full"), written_whole(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "before"}


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path):
    (tmp_path / "other-disk").mkdir()
    (tmp_path / "link").symlink_to("other-disk")
    with folder_written_whole(tmp_path / "link") as part:
        (part / "file").write_text("all")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "other-disk" / "file").read_text() == "all"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "other-disk"]


def test_a_mounted_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.is_mount", lambda path: path == tmp_path.resolve())
    with pytest.raises(OSError, match="a disk is mounted there"), folder_written_whole(tmp_path):
        raise AssertionError("it was begun")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_may_read(tmp_path, umask):
    before = os.umask(umask)
    try:
        with folder_written_whole(tmp_path / "folder") as part:
            save_file({"weight": torch.zeros(2)}, part / "model.safetensors")
            (part / "below").mkdir()
            (part / "below" / "config.json").write_text("{}")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "folder").rglob("*") if path.is_file()]
    assert [path.stat().st_mode & 0o777 for path in files] == [0o666 & ~umask] * 2
