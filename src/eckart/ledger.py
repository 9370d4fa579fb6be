"""What has been measured so far, in one SQLite file, so that a killed search goes on where it was."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eckart.errors import OutputError
from eckart.scoring import BlockScores

_SCHEMA = """
CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS trials (
    part TEXT NOT NULL,      -- 'validation' or 'test'
    edit TEXT NOT NULL,      -- the edit as JSON; empty for the unedited model
    block INTEGER NOT NULL,  -- block of examples
    scores TEXT NOT NULL,    -- losses, right answers and predictions of its examples, as JSON
    PRIMARY KEY (part, edit, block)
);
CREATE TABLE IF NOT EXISTS notes (note TEXT PRIMARY KEY);
"""


class Ledger:
    """Scores by (part, edit, block of examples); floats go through JSON unchanged, so a resumed run is the same run."""

    def __init__(self, path: Path | None, fingerprint: dict[str, str]):
        """Open or begin a ledger.

        Args:
            path: The file, or None to keep it in memory.
            fingerprint: Hashes of everything that scores depend on.

        Raises:
            OutputError: The file belongs to other weights, another task, settings or code, or is not a ledger.
        """
        self.path = path
        try:
            self._connection = sqlite3.connect(path or ":memory:", isolation_level=None)
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        try:
            self._begin(fingerprint)
        except BaseException:
            self._connection.close()
            raise

    def _begin(self, fingerprint: dict[str, str]) -> None:
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.executescript(_SCHEMA)
            known = dict(self._connection.execute("SELECT key, value FROM about"))
            if not known:
                with self._connection:  # all or none, whatever happens inside
                    self._connection.execute("BEGIN IMMEDIATE")
                    self._connection.executemany("INSERT INTO about VALUES (?, ?)", sorted(fingerprint.items()))
        except (sqlite3.Error, ValueError) as error:  # ValueError: names in a damaged file need not be UTF-8
            raise self._unusable(error) from error
        for key in sorted(fingerprint.keys() | known.keys()) if known else ():
            if known.get(key) != fingerprint.get(key):
                raise OutputError(
                    f"{self.path} holds a search with another {key} ({known.get(key)}, now {fingerprint.get(key)}). "
                    "An unfinished search is resumed with what it began with. Use that, or choose another --out."
                )

    def _unusable(self, error: Exception) -> OutputError:
        return OutputError(
            f"{self.path} cannot be used as a ledger: {error}. It is an SQLite file that eckart search made. "
            "Choose another --out."
        )

    @property
    def empty(self) -> bool:
        """Nothing was measured yet, for sure."""
        try:
            return self._connection.execute("SELECT 1 FROM trials LIMIT 1").fetchone() is None
        except (sqlite3.Error, ValueError):
            return False

    def known(self, part: str, edit: str) -> dict[int, BlockScores]:
        """Give the blocks that were scored for an edit.

        Args:
            part: `validation` or `test`.
            edit: The edit's key.

        Returns:
            Block index -> scores.

        Raises:
            OutputError: The file is damaged.
        """
        try:
            rows = self._connection.execute(
                "SELECT block, scores FROM trials WHERE part = ? AND edit = ?", (part, edit)
            )
            return {block: BlockScores(**json.loads(scores)) for block, scores in rows}
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise self._unusable(error) from error

    def add(self, part: str, edit: str, scores: dict[int, BlockScores]) -> None:
        """Record blocks of an edit, all or none.

        Args:
            part: `validation` or `test`.
            edit: The edit's key.
            scores: Block index -> scores.

        Raises:
            OutputError: The disk is full.
        """
        rows = [(part, edit, block, json.dumps(asdict(s))) for block, s in scores.items()]
        self._write("INSERT OR REPLACE INTO trials VALUES (?, ?, ?, ?)", rows)

    def note(self, what: str) -> None:
        """Record something that a resumed search must know.

        Args:
            what: A word.

        Raises:
            OutputError: The disk is full.
        """
        self._write("INSERT OR REPLACE INTO notes VALUES (?)", [(what,)])

    def noted(self, what: str) -> bool:
        """Tell whether something was noted.

        Args:
            what: As for `note`.

        Returns:
            Whether it was.

        Raises:
            OutputError: The file is damaged.
        """
        try:
            return self._connection.execute("SELECT 1 FROM notes WHERE note = ?", (what,)).fetchone() is not None
        except (sqlite3.Error, ValueError) as error:
            raise self._unusable(error) from error

    def _write(self, statement: str, rows: list[tuple[Any, ...]]) -> None:
        try:
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.executemany(statement, rows)
        except (sqlite3.Error, ValueError) as error:
            raise OutputError(
                f"{self.path} cannot be written: {error}. What was recorded before is kept. "
                "Free space and give the same command again: it resumes."
            ) from error

    def close(self) -> None:
        """Fold the write-ahead log into the file and close it."""
        try:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            self._connection.close()


def code_sha256() -> str:
    """Hash eckart's own sources, since scores depend on them.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
