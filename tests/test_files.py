"""Files appear whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from vssm.files import atomic_path


def test_old_content_stays_until_the_new_is_complete(tmp_path):
    target = tmp_path / "results.json"
    target.write_text("old")
    with target.open() as reader:
        with atomic_path(target) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.suffix == ".json"
            temporary.write_text("new")
            assert target.read_text() == "old"
        assert reader.read() == "old"  # who has opened the old file never sees a mixture
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["results.json"]


def test_failure_changes_nothing(tmp_path):
    target = tmp_path / "results.json"
    target.write_text("old")

    def fail():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_an_interrupt_just_after_the_file_appears_leaves_none(tmp_path, monkeypatch):
    touch = Path.touch

    def interrupted(path, **options):
        touch(path, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "touch", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "results.json"):
        pass
    assert os.listdir(tmp_path) == []


def test_folders_are_made_and_others_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "new" / "folder" / "file.txt") as temporary:
            temporary.write_text("x")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "folder" / "file.txt").stat().st_mode) == 0o640
