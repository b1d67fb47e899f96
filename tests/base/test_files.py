"""Files appear whole or not at all, and one process at a time writes a folder."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from x2i.base.errors import X2IError
from x2i.base.files import atomic, exclusive, remove, remove_leftovers, write_text, writing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new/folder/x.txt"
    write_text(target, "old")

    def fail() -> None:
        with atomic(target) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]
    write_text(target, "naïve")
    assert target.read_bytes() == "naïve".encode()


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic(tmp_path / "group") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("a")
        assert not (tmp_path / "group").exists()
    assert (tmp_path / "group/a").read_text() == "a"


def test_a_killed_writer_leaves_only_what_the_next_one_clears_away(tmp_path: Path) -> None:
    script = """if True:
        import os, signal, sys
        from pathlib import Path
        from x2i.base.files import atomic
        with atomic(Path(sys.argv[1])) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "x.txt"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "x.txt").exists()
    assert len(list(tmp_path.iterdir())) == 1
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_told_what_the_first_is_doing(tmp_path: Path) -> None:
    script = """if True:
        import sys
        from x2i.base.errors import X2IError
        from x2i.base.files import exclusive
        try:
            with exclusive(sys.argv[1], "counting sheep"):
                print("entered")
        except X2IError as error:
            print(error)
    """
    command = [sys.executable, "-c", script, str(tmp_path / "corpus")]

    def ask() -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with exclusive(tmp_path / "corpus", "building"):
        assert "another process is counting sheep here" in ask()
    assert ask() == "entered\n"


def test_the_lock_is_given_back_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(X2IError, match="no"), exclusive(tmp_path / "corpus", "building"):
        raise X2IError("no")
    with exclusive(tmp_path / "corpus", "building"):
        pass


def test_removing_what_is_not_there_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "folder/in").mkdir(parents=True)
    for name in ("folder", "folder", "file"):
        remove(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_though_the_writer_counts_bytes_only(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"12 requested and 3 written.*here\.npy"), writing(tmp_path / "here.npy"):
        raise OSError("12 requested and 3 written")  # as numpy says it


def test_a_lock_that_cannot_be_made_is_no_other_process() -> None:
    with pytest.raises(OSError, match="proc"), exclusive("/proc/corpus", "building"):
        pass
