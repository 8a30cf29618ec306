"""A file that is replaced: the old one or the new one, whatever happens, and nobody's but whose it should be."""

import os
import re
import time
from contextlib import suppress

import pytest

from common import durable
from common.adapter.values import Key
from common.error import BouquetError
from common.stamp import utc_now


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "state.json"
    durable.write(file, "old")
    inode = file.stat().st_ino
    durable.write(file, b"new")
    assert file.read_bytes() == b"new"
    assert file.stat().st_ino != inode
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_is_not_written_to_its_end_is_that_of_before(tmp_path):
    file = tmp_path / "state.json"
    durable.write(file, "old")
    with suppress(KeyboardInterrupt), durable.replacing(file) as building:
        building.write_text("half of the ne")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_put_on_the_disk_is_there_before_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def note_fsync(handle: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "content")
        fsync(handle)

    monkeypatch.setattr(durable.os, "fsync", note_fsync)
    monkeypatch.setattr(durable.os, "replace", lambda old, new: (done.append("name"), replace(old, new)))
    durable.write(tmp_path / "state.json", "new")
    assert done == ["content", "name", "folder"]


@pytest.mark.parametrize("left", ["a file of others", "a link"])
def test_a_private_file_is_never_open_to_others_and_follows_no_link(left, tmp_path):
    file, building = tmp_path / "key", tmp_path / "key.building"
    if left == "a link":
        building.symlink_to(tmp_path / "elsewhere")
    else:
        building.write_text("")
        building.chmod(0o666)
    with durable.replacing(file, durable.PRIVATE) as given:
        assert given.stat().st_mode & 0o777 == 0o600
        given.write_text("secret")
    assert file.read_text() == "secret"
    assert file.stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_of_everybodys_has_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        durable.write(tmp_path / "report.html", "")
    finally:
        os.umask(before)
    assert (tmp_path / "report.html").stat().st_mode & 0o777 == 0o640


def test_a_moment_is_written_in_utc(monkeypatch):
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2026, 1, 1, 0, 0, 0, 3, 1, 0)))
    assert utc_now() == "2026-01-01T00:00:00Z"
    monkeypatch.undo()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", utc_now())


@pytest.mark.parametrize("layer", ["model.layers.0.q_proj", "a:b", "memory/momentum/l"])
def test_a_key_is_parsed_as_it_is_written(layer):
    assert Key.parse(str(Key(layer, "A"))) == Key(layer, "A")


@pytest.mark.parametrize("text", ["", "layer", "layer:", ":A"])
def test_what_is_no_key_is_told(text):
    with pytest.raises(BouquetError, match="a tensor without a layer or a part: expected a name layer:part") as told:
        Key.parse(text)
    assert text in str(told.value)
