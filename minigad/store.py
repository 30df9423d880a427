"""A store of teacher calls in one SQLite file: every answer that was paid for, what each call cost, and who is asking now.

An answer is on disk before anyone counts it. A second run finds it and does not call; two processes may share the file,
since a call is claimed before it is made. A claim lapses when its owner stops renewing it, so that a killed run blocks
nobody for longer than LEASE; what its call cost is then unknown and booked at the most it can have been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from minigad.config import UserError
from minigad.locking import can_lock, warn_without_locks
from minigad.teacher import Answer, Messages, Sampling

__all__ = ["Ledger", "Store", "Stored", "request_key"]

SCHEMA = 1  # of the request and of the tables; part of every key
LEASE = 10.0  # seconds; renewed three times as often
BUSY = 60.0  # seconds to wait for another process's write

TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, request TEXT NOT NULL, answer TEXT NOT NULL, written REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS calls (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, owner TEXT NOT NULL, started REAL NOT NULL, lease REAL,
    outcome TEXT, message TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, cost REAL NOT NULL, maybe REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS open_calls ON calls (key) WHERE outcome IS NULL;
CREATE TABLE IF NOT EXISTS totals (
    only INTEGER PRIMARY KEY CHECK (only = 1), calls INTEGER, prompt_tokens INTEGER, completion_tokens INTEGER,
    cost REAL, maybe REAL
);
INSERT OR IGNORE INTO totals VALUES (1, 0, 0, 0, 0.0, 0.0);
"""


class Stored(NamedTuple):
    """An answer of the store with the request that it answers."""

    messages: Messages
    answer: Answer


class Ledger(NamedTuple):
    """What the store's calls came to. Money in dollars.

    cost: of calls whose tokens are known; maybe: the most that broken-off calls can have cost beyond that.
    """

    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    maybe: float

    def lines(self) -> list[str]:
        """Return the ledger as sentences."""
        tokens = f"{self.prompt_tokens} prompt and {self.completion_tokens} completion tokens"
        lines = [f"The store holds {self.calls} calls in all: {tokens}, ${self.cost:.4f}."]
        if self.maybe:
            lines.append(
                f"Calls that broke off may have cost up to ${self.maybe:.4f} more; it counts against the budget."
            )
        return lines


def request_key(model: str, messages: Messages, sampling: Sampling, sample: int) -> str:
    """Return the name of an answer: SHA-256 of model, messages, sampling settings, sample index and schema."""
    parts = [SCHEMA, model, [[m["role"], m["content"]] for m in messages], dataclasses.astuple(sampling), sample]
    return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()


class Store:
    """An open store; safe to use from several threads. Close it, or use it as a context manager."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.owner = uuid.uuid4().hex
        self._lock = threading.RLock()
        self._db = _open(self.path)
        self._closing = threading.Event()
        self._renewer = threading.Thread(target=self._renew, daemon=True)
        self._renewer.start()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a call that is still open is given up, like that of a killed process."""
        self._closing.set()
        self._renewer.join()
        with self._lock:
            self._db.close()

    def get(self, key: str) -> Stored | None:
        """Return the answer of that key, or None."""
        with self._using() as db:
            row = db.execute("SELECT request, answer FROM answers WHERE key = ?", (key,)).fetchone()
        return Stored(json.loads(row[0])["messages"], Answer(**json.loads(row[1]))) if row else None

    def claim(self, key: str, most: float, budget: float | None) -> int | str:
        """Book a call that may cost `most` dollars and return its number; or say why it must not be made (now).

        "answered": the answer is there; "claimed": another call for it is under way; "waiting": the budget may have room
        when the calls under way are done; "budget": it has none.
        """
        now = time.time()
        with self._transaction() as db:
            self._expire(db, now)
            if db.execute("SELECT 1 FROM answers WHERE key = ?", (key,)).fetchone():
                return "answered"
            if db.execute("SELECT 1 FROM calls WHERE key = ? AND outcome IS NULL", (key,)).fetchone():
                return "claimed"
            if budget is not None:
                spent = db.execute("SELECT cost + maybe FROM totals").fetchone()[0]
                reserved = db.execute("SELECT COALESCE(SUM(maybe), 0) FROM calls WHERE outcome IS NULL").fetchone()[0]
                if spent + reserved + most > budget + 1e-9:
                    return "waiting" if reserved > 0 else "budget"
            values = (key, self.owner, now, now + LEASE, most)
            insert = "INSERT INTO calls (key, owner, started, lease, cost, maybe) VALUES (?, ?, ?, ?, 0, ?)"
            return int(db.execute(insert, values).lastrowid or 0)

    def settle(
        self, call: int, model: str, request: dict[str, Any], answer: Answer, tokens: tuple[int, int], cost: float
    ) -> None:
        """Write the answer of a claimed call and its cost, in one transaction.

        The text is kept as escaped JSON: halves of characters and NULs, which SQLite cannot hold, come back as they were.
        """
        with self._transaction() as db:
            key = db.execute("SELECT key FROM calls WHERE id = ?", (call,)).fetchone()[0]
            values = (key, model, json.dumps(request), json.dumps(dataclasses.asdict(answer)), time.time())
            db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)", values)
            self._end(db, call, "answered", "", tokens, cost, 0.0)

    def fail(self, call: int, message: str, maybe: float) -> None:
        """End a claimed call that gave no answer; `maybe` is what it can have cost, in dollars."""
        with self._transaction() as db:
            self._end(db, call, "failed", message, (0, 0), 0.0, maybe)

    def ledger(self) -> Ledger:
        """Return the sums over all calls that ended, of every process and every run of this store."""
        with self._using() as db:
            columns = "calls, prompt_tokens, completion_tokens, cost, maybe"
            return Ledger(*db.execute(f"SELECT {columns} FROM totals").fetchone())

    def count(self) -> int:
        """Return the number of answers."""
        with self._using() as db:
            return int(db.execute("SELECT COUNT(*) FROM answers").fetchone()[0])

    def journal_mode(self) -> str:
        """Return "wal", or "delete" where the file system cannot share memory (network drives)."""
        with self._lock:
            return str(self._db.execute("PRAGMA journal_mode").fetchone()[0])

    @contextlib.contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        """Turn what SQLite says of a disk that is full or a file that is damaged into a UserError."""
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                raise UserError(
                    f"{self.path}: the store cannot be used ({error}); the answers that were counted are safe: make room, or "
                    "mend the disk, then give the same command again"
                ) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._using() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # on a full disk SQLite may have rolled back by itself
                    db.execute("ROLLBACK")
                raise

    def _end(
        self,
        db: sqlite3.Connection,
        call: int,
        outcome: str,
        message: str,
        tokens: tuple[int, int],
        cost: float,
        maybe: float,
    ) -> None:
        was = db.execute("SELECT outcome, maybe FROM calls WHERE id = ?", (call,)).fetchone()
        if was[0] == "lost":  # booked as lost while this process slept: take that back first
            db.execute("UPDATE totals SET calls = calls - 1, maybe = maybe - ?", (was[1],))
        values = (outcome, message, *tokens, cost, maybe, call)
        db.execute(
            "UPDATE calls SET outcome = ?, message = ?, prompt_tokens = ?, completion_tokens = ?, cost = ?, maybe = ? "
            "WHERE id = ?",
            values,
        )
        db.execute(
            "UPDATE totals SET calls = calls + 1, prompt_tokens = prompt_tokens + ?, "
            "completion_tokens = completion_tokens + ?, cost = cost + ?, maybe = maybe + ?",
            (*tokens, cost, maybe),
        )

    def _expire(self, db: sqlite3.Connection, now: float) -> None:
        """Book the calls of owners that are gone: nobody will ever say what they cost."""
        gone = db.execute("SELECT id, maybe FROM calls WHERE outcome IS NULL AND lease < ?", (now,)).fetchall()
        for call, maybe in gone:
            self._end(db, call, "lost", "the process that made the call is gone", (0, 0), 0.0, maybe)

    def _renew(self) -> None:
        while not self._closing.wait(LEASE / 3):
            with self._lock, contextlib.suppress(sqlite3.Error):  # whoever writes an answer next says it
                self._db.execute(
                    "UPDATE calls SET lease = ? WHERE outcome IS NULL AND owner = ?", (time.time() + LEASE, self.owner)
                )


def _open(path: Path) -> sqlite3.Connection:
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {str(path.parent)!r}; make it first")
    try:
        db = _connect(path)
        try:
            _prepare(db, path)
        except BaseException:
            db.close()
            raise
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"{path}: cannot use the store ({error}); check the disk, or name another with --store"
        ) from None
    return db


def _connect(path: Path) -> sqlite3.Connection:
    if can_lock(path.parent):
        return sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
    warn_without_locks(path.parent)
    # SQLite's own way of doing without: its journal still makes good what a kill left half-written.
    name = f"file:{quote(str(path))}?vfs=unix-none"
    return sqlite3.connect(name, timeout=BUSY, isolation_level=None, check_same_thread=False, uri=True)


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, SCHEMA):
        raise UserError(
            f"{path}: the store has schema {version}, this minigad writes {SCHEMA}; name another with --store"
        )
    try:
        mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        db.execute("BEGIN IMMEDIATE")  # WAL may be granted and still fail at the first write
        db.execute("COMMIT")
    except sqlite3.OperationalError:
        mode = ""
    if mode != "wal":
        db.execute("PRAGMA journal_mode = DELETE")
    db.execute("PRAGMA synchronous = FULL")  # a call takes seconds and costs money: the disk may take its milliseconds
    db.executescript(TABLES)
    db.execute(f"PRAGMA user_version = {SCHEMA}")
