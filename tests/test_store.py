"""The store of teacher calls: written before it is counted, shared, resumed, killed, and never paid twice."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigad import store as store_module
from minigad.config import UserError
from minigad.store import Store, request_key
from minigad.teacher import Answer, Sampling

USER = [{"role": "user", "content": "hello"}]


def settle(store, call, text="answer", cost=0.5):
    store.settle(call, "m", {"messages": USER}, Answer(text), (3, 4), cost)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "s.db") as opened:
        yield opened


def test_the_key_names_everything_that_changes_an_answer():
    """Model, messages, each sampling setting and the sample index; the order of a message's fields does not matter."""
    base = request_key("m", USER, Sampling(), 0)
    others = [
        request_key("n", USER, Sampling(), 0),
        request_key("m", [{"role": "system", "content": "hello"}], Sampling(), 0),
        request_key("m", [{"role": "user", "content": "hello "}], Sampling(), 0),
        request_key("m", [*USER, *USER], Sampling(), 0),
        request_key("m", USER, Sampling(temperature=0.5), 0),
        request_key("m", USER, Sampling(max_tokens=5), 0),
        request_key("m", USER, Sampling(seed=0), 0),
        request_key("m", USER, Sampling(), 1),
    ]
    assert len({base, *others}) == 9
    assert request_key("m", [{"content": "hello", "role": "user"}], Sampling(), 0) == base
    # Frozen: another value would ask again for everything that users have paid for.
    assert base == "d14dea27f512a7e8a3748dbedb9ddfaa5cb3ca39b4ab2be824c64972f1f30a36"


def test_an_answer_is_found_again_with_its_request(store, tmp_path):
    """After closing and opening too."""
    call = store.claim("k", 1.0, None)
    assert store.get("k") is None
    settle(store, call)
    with Store(tmp_path / "s.db") as again:
        for each in (store, again):
            assert each.get("k") == (USER, Answer("answer"))
        assert again.ledger() == (1, 3, 4, 0.5, 0.0)
        assert again.claim("k", 1.0, None) == "answered"


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=())))
def test_any_text_comes_back(text):
    """Halves of characters, NULs and all else."""
    with Store(":memory:") as store:
        call = store.claim("k", 0.0, None)
        store.settle(call, "m", {"messages": [{"role": "user", "content": text}]}, Answer(text), (0, 0), 0.0)
        assert store.get("k") == ([{"role": "user", "content": text}], Answer(text))


def test_two_processes_do_not_ask_for_the_same(store, tmp_path):
    """A claim is seen by all; ended, it leaves room or an answer."""
    with Store(tmp_path / "s.db") as other:
        call = store.claim("k", 1.0, None)
        assert other.claim("k", 1.0, None) == "claimed"
        assert isinstance(other.claim("another", 1.0, None), int)
        store.fail(call, "no", 0.0)
        assert isinstance(other.claim("k", 1.0, None), int)


def test_the_budget_counts_what_is_under_way(store, tmp_path):
    """A call waits for those in flight, and is refused for good when they are done and there is no room."""
    with Store(tmp_path / "s.db") as other:
        call = store.claim("a", 0.6, 1.0)
        assert other.claim("b", 0.6, 1.0) == "waiting"
        settle(store, call, cost=0.3)
        second = other.claim("b", 0.6, 1.0)
        assert isinstance(second, int)
        other.fail(second, "reset", 0.6)
        assert store.ledger().maybe == 0.6
        assert store.claim("c", 0.2, 1.0) == "budget"
        assert isinstance(store.claim("c", 0.1, 1.0), int)


def test_a_claim_lapses_with_its_owner_and_not_before(store, monkeypatch):
    """A live owner renews; a silent one's call is booked at its most, and taken back if it answers after all."""
    call = store.claim("k", 0.7, None)
    store._db.execute("UPDATE calls SET lease = 0")
    retaken = store.claim("k", 0.7, None)
    assert isinstance(retaken, int) and retaken != call
    assert store.ledger() == (1, 0, 0, 0.0, 0.7)
    settle(store, call, "late", cost=0.2)
    assert store.ledger() == (1, 3, 4, 0.2, pytest.approx(0.0))
    settle(store, retaken, "second", cost=0.2)
    assert store.get("k").answer.text == "late"
    assert store.ledger().calls == 2


def test_leases_are_renewed(tmp_path, monkeypatch):
    """A call that takes longer than a lease keeps its claim."""
    monkeypatch.setattr(store_module, "LEASE", 0.6)
    with Store(tmp_path / "s.db") as store, Store(tmp_path / "s.db") as other:
        store.claim("k", 0.0, None)
        time.sleep(1.2)
        assert other.claim("k", 0.0, None) == "claimed"


def test_wal_and_what_comes_where_it_cannot_work(tmp_path, monkeypatch):
    """WAL on a disk; DELETE where the file system has no shared memory, as on Colab's Drive."""
    with Store(tmp_path / "a.db") as store:
        assert store.journal_mode() == "wal"

    class NoSharedMemory(sqlite3.Connection):
        def execute(self, sql, *values):
            if sql == "PRAGMA journal_mode = WAL":
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(sql, *values)

    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: real(path, factory=NoSharedMemory, **options))
    with Store(tmp_path / "b.db") as store:
        assert store.journal_mode() == "delete"
        settle(store, store.claim("k", 0.0, None))
    with Store(tmp_path / "b.db") as store:
        assert store.get("k")


def test_what_is_no_store_is_named(tmp_path):
    """A file of another kind, of a later version, in no folder: one sentence each, and the file is left alone."""
    (tmp_path / "a.db").write_bytes(b"hello, this is not a database" * 100)
    with pytest.raises(UserError, match=r"cannot use the store .*name another with --store"):
        Store(tmp_path / "a.db")
    with sqlite3.connect(tmp_path / "b.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(UserError, match="schema 99, this minigad writes 1"):
        Store(tmp_path / "b.db")
    with pytest.raises(UserError, match="there is no folder"):
        Store(tmp_path / "no" / "c.db")


def test_a_full_disk_is_one_sentence_and_costs_nothing_that_was_counted(store, tmp_path):
    """SQLite's own "database or disk is full"; with room again, the same store goes on."""
    settle(store, store.claim("kept", 0.0, None))
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages + 1}")
    call = store.claim("k", 0.25, None)
    with pytest.raises(UserError, match=r"s.db: the store cannot be used \(database or disk is full\).*make room"):
        settle(store, call, "x" * 100_000)
    assert store.get("kept").answer.text == "answer" and store.get("k") is None
    assert store.ledger().calls == 1
    store._db.execute("PRAGMA max_page_count = 100000")
    settle(store, call, "x" * 100_000)
    assert len(store.get("k").answer.text) == 100_000


def test_a_damaged_store_is_one_sentence(tmp_path):
    with Store(tmp_path / "s.db") as store:
        for i in range(200):
            settle(store, store.claim(f"k{i}", 0.0, None), "x" * 500)
    data = bytearray((tmp_path / "s.db").read_bytes())
    data[8192:] = os.urandom(len(data) - 8192)
    (tmp_path / "s.db").write_bytes(data)
    words = r"s.db: .*(cannot use the store|the store cannot be used) \(.*malformed"
    with pytest.raises(UserError, match=words), Store(tmp_path / "s.db") as store:
        [store.get(f"k{i}") for i in range(200)]


WRITER = """
import sys
from minigad.store import Store
from minigad.teacher import Answer
with Store(sys.argv[1]) as store:
    for i in range(100_000):
        call = store.claim(f"{sys.argv[2]}-{i}", 0.0, None)
        if isinstance(call, int):
            store.settle(call, "m", {"messages": []}, Answer("x" * 2000), (1, 1), 0.0)
            print(i, flush=True)
"""


def test_kill_9_loses_nothing_that_was_counted(tmp_path):
    """Two writers killed at random moments: the file is whole, and holds every answer that either had counted."""
    path, env = tmp_path / "s.db", {**os.environ, "OMP_NUM_THREADS": "1"}
    counted: dict[str, int] = {}
    for round in range(3):
        names = [f"{round}a", f"{round}b"]
        writers = {
            name: subprocess.Popen([sys.executable, "-c", WRITER, path, name], stdout=subprocess.PIPE, env=env)
            for name in names
        }
        for writer in writers.values():
            writer.stdout.readline()
        time.sleep(random.Random(round).uniform(0.05, 0.4))
        for name, writer in writers.items():
            writer.send_signal(signal.SIGKILL)
            lines = writer.communicate()[0].split(b"\n")
            counted[name] = int(lines[-2]) + 1 if len(lines) > 1 else 1
    with Store(path) as store:
        assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        for name, number in counted.items():
            assert all(store.get(f"{name}-{i}") for i in range(number))
        assert sum(counted.values()) <= store.count() <= sum(counted.values()) + len(counted)
        assert store.ledger().calls >= store.count()
