"""Files are there whole or not at all, with the links and modes they had."""

import os
import stat
import subprocess
import sys

import pytest

from prunus.core.files import atomic_write, check_writable

posix = pytest.mark.skipif(os.name != "posix", reason="modes and signals are those of POSIX")


def write(path, text):
    with atomic_write(path) as draft:
        draft.write_text(text)


@posix
def test_a_link_stays_a_link_to_the_new_file(tmp_path):
    target, link = tmp_path / "a" / "real", tmp_path / "link"
    write(target, "old")
    link.symlink_to(target)
    write(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    (tmp_path / "dangling").symlink_to(tmp_path / "b" / "made")
    write(tmp_path / "dangling", "too")
    assert (tmp_path / "b" / "made").read_text() == "too"


@posix
def test_a_file_keeps_its_mode_and_a_new_one_takes_that_of_the_umask(tmp_path):
    path, before = tmp_path / "f", os.umask(0o027)
    try:
        write(path, "one")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o600)
        write(path, "two")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)


KILLED = """
import os, sys
from prunus.core.files import atomic_write
with atomic_write(sys.argv[1]) as draft:
    draft.write_text("half")
    os._exit(9)
"""


@posix
def test_the_next_write_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    path = tmp_path / "f.safetensors"
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)]).returncode == 9
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".f.safetensors.")
    (tmp_path / ".f.safetensors.mine").touch()
    with atomic_write(path) as other:
        write(path, "whole")
        assert other.exists()
        other.write_text("last")
    assert sorted(os.listdir(tmp_path)) == [".f.safetensors.mine", "f.safetensors"]
    assert path.read_text() == "last"


def test_what_cannot_be_written_is_told_before_and_leaves_nothing(tmp_path):
    check_writable(tmp_path / "new" / "f")
    assert os.listdir(tmp_path / "new") == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=str(path)):
            check_writable(path)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write(tmp_path, "x")
