"""A disk that cannot do much, and one that fails: below every library, by poor_disk.c in a process of its own.

No real Drive was at hand: what its mount refuses is simulated, after what users report of Colab.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minigad import locking
from minigad.config import UserError
from minigad.run_directory import lock
from minigad.store import Store
from minigad.teacher import Answer

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def poor(tmp_path_factory):
    """Return a function that runs a mode of poor_disk_worker.py and returns what it printed, and its stderr."""
    if not sys.platform.startswith("linux") or not shutil.which("gcc"):
        pytest.skip("needs Linux and gcc")
    library = tmp_path_factory.mktemp("poor") / "poor_disk.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, TESTS / "poor_disk.c", "-ldl"], check=True
    )
    env = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}

    def worker(*words):
        command = [sys.executable, TESTS / "poor_disk_worker.py", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return worker


def test_a_run_and_a_collection_on_a_drive_mount(poor, tmp_path):
    """No locks, links, chmod or shared memory, no sync of a folder, no rename onto one: killed, resumed, bit for bit the same."""
    found, said = poor("drive", tmp_path)
    assert found["same"] == [True, True]
    assert found["kills"] == [True, True, True]
    assert found["asked"] == 4  # of ten: six answers were stored before the kill
    assert found["kept"] == [10, 10, 10, 10]
    assert found["mode"] == "delete"
    assert found["held"] == 10
    assert found["loaded"] == "Players" and found["report"]
    assert f"{tmp_path}/drive/run is on a file system without locks" in said
    assert f"{tmp_path}/drive is on a file system without locks" in said
    assert found["refused"]["locks"] and found["refused"]["folder syncs"]  # the mount was poor indeed


def failing_writes(poor, folder, stride):
    found, _ = poor("writes", folder, stride)
    assert found["calls"] > 90
    assert not found["wrong"]
    assert 0 < 2 * len(found["spared"]) < len(found["said"])  # those ended as if nothing had failed
    reasons = ("No space left on device", "Permission denied", "Input/output error")
    for said in found["said"]:
        assert any(reason in said for reason in reasons), said
        assert "--resume" in said or "give another --output-dir" in said, said
    return found


def test_every_seventh_call_that_writes_fails(poor, tmp_path):
    """In a run's last step, its checkpoint, and all that follows, both players' folders included."""
    failing_writes(poor, tmp_path, 7)


@pytest.mark.slow
def test_every_call_that_writes_fails_in_turn(poor, tmp_path):
    """All of them: opens, writes (half done), syncs, renames, folders, truncations, of every library in the process."""
    found = failing_writes(poor, tmp_path, 1)
    said, spared = len(found["said"]), len(found["spared"])
    assert said + spared == found["calls"]
    print(
        f"{found['calls']} calls failed in turn: {said} ended in a sentence, {spared} did no harm; the checkpoint before always loaded"
    )


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL])
@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_whatever_a_file_system_says_to_locks_it_is_said_and_used(code, kind, tmp_path, monkeypatch, capsys):
    def refused(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(f"fcntl.{kind}", refused)
    with lock(tmp_path / "run"):
        assert f"{tmp_path / 'run'} is on a file system without locks" in capsys.readouterr().err
    with Store(tmp_path / "a b?#%.db") as store:
        store.settle(store.claim("k", 0.0, None), "m", {"messages": []}, Answer("x"), (1, 1), 0.0)
        assert store.journal_mode() == "delete"
    assert "file system without locks" in capsys.readouterr().err
    monkeypatch.undo()
    with Store(tmp_path / "a b?#%.db") as store:
        assert store.get("k").answer.text == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b?#%.db", "run"]


def test_a_folder_that_cannot_be_written_is_not_one_without_locks(tmp_path, monkeypatch):
    """Then it is the write that is refused, in words of its own."""

    def refused(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(locking.tempfile, "TemporaryFile", refused)
    assert locking.can_lock(tmp_path)
    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"), lock(tmp_path):
        pass
