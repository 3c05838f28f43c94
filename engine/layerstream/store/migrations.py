"""The index's schema, as the steps that lead to it. A step, once released, is never edited: the next one is added."""

from __future__ import annotations

import re
import sqlite3

from layerstream.errors import KVStoreUnusable

APPLICATION_ID = 0x4C534B56  # "LSKV", in the header of the SQLite file

STEPS = (
    """
    CREATE TABLE namespaces (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, description TEXT NOT NULL);
    CREATE TABLE segments (
        id INTEGER PRIMARY KEY,
        namespace INTEGER NOT NULL REFERENCES namespaces ON DELETE CASCADE,
        name TEXT NOT NULL,
        num_bytes INTEGER NOT NULL,
        num_pages INTEGER NOT NULL,
        seconds REAL NOT NULL,             -- what computing its pages took
        frequency INTEGER NOT NULL DEFAULT 1,
        priority REAL NOT NULL,            -- eviction: clock at the last use + frequency * seconds / bytes
        pinned INTEGER NOT NULL DEFAULT 0,
        created REAL NOT NULL,             -- wall clock, for people only
        last_used REAL NOT NULL,           -- likewise
        writer TEXT,                       -- who is writing it, NULL once it is whole
        UNIQUE (namespace, name)
    );
    CREATE TABLE pages (
        namespace INTEGER NOT NULL,
        key BLOB NOT NULL,
        parent BLOB NOT NULL,
        segment INTEGER NOT NULL REFERENCES segments ON DELETE CASCADE,
        slot INTEGER NOT NULL,             -- which page of the segment it is
        PRIMARY KEY (namespace, key)
    ) WITHOUT ROWID;
    CREATE INDEX pages_by_segment ON pages (segment);
    CREATE INDEX pages_by_parent ON pages (namespace, parent);
    CREATE TABLE leases (
        namespace INTEGER NOT NULL,
        key BLOB NOT NULL,
        owner TEXT NOT NULL,
        expires REAL NOT NULL,
        PRIMARY KEY (namespace, key)
    ) WITHOUT ROWID;
    CREATE TABLE digests (
        path TEXT PRIMARY KEY,
        inode INTEGER NOT NULL,
        num_bytes INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL,
        ctime_ns INTEGER NOT NULL,
        sha256 TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE clock (id INTEGER PRIMARY KEY CHECK (id = 0), value REAL NOT NULL);
    INSERT INTO clock VALUES (0, 0.0);
    """,
    """
    CREATE TABLE answers (
        id INTEGER PRIMARY KEY,
        namespace INTEGER NOT NULL REFERENCES namespaces ON DELETE CASCADE,
        prefix BLOB,                       -- the page that it hangs on, NULL for a prompt shorter than a page
        question BLOB NOT NULL,            -- token ids behind that page
        answer BLOB NOT NULL,
        last_used REAL NOT NULL,
        FOREIGN KEY (namespace, prefix) REFERENCES pages (namespace, key) ON DELETE CASCADE
    );
    CREATE INDEX answers_by_prefix ON answers (namespace, prefix);
    CREATE INDEX answers_by_use ON answers (last_used);
    """,
    """
    CREATE TABLE numbers (last INTEGER NOT NULL);  -- ids of namespaces and segments: counted up, never used again
    INSERT INTO numbers SELECT max(coalesce((SELECT max(id) FROM namespaces), 0),
        coalesce((SELECT max(id) FROM segments), 0));
    ALTER TABLE answers ADD COLUMN tenant TEXT NOT NULL DEFAULT '';  -- the name of its namespace, checked at use
    UPDATE answers SET tenant = (SELECT name FROM namespaces WHERE namespaces.id = answers.namespace);
    """,
    """
    ALTER TABLE segments ADD COLUMN is_snapshot INTEGER NOT NULL DEFAULT 0;  -- states of recurrent layers
    """,
    """
    CREATE TABLE retrievers (id INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE, retrievals INTEGER NOT NULL);
    CREATE TABLE retrieved (
        document BLOB PRIMARY KEY,         -- a hash of tenant and text
        tenant INTEGER NOT NULL REFERENCES retrievers ON DELETE CASCADE,
        weight REAL NOT NULL,              -- of its count: retrievals.py
        last_used REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX retrieved_by_use ON retrieved (last_used);
    CREATE INDEX retrieved_by_tenant ON retrieved (tenant);
    """,
)
_TABLE = re.compile(r"CREATE TABLE (\w+)")


def migrate(connection: sqlite3.Connection, where: object) -> None:
    """Bring the database to the newest schema.

    Raises:
        KVStoreUnusable: it is another program's, or from a newer version. Nothing is changed then.
        DatabaseError: tables are missing that were there once.
    """
    connection.execute("BEGIN IMMEDIATE")  # the lock first: another process may be making the same database
    try:
        version = _check_version(connection, where)
        for step in STEPS[version:]:
            for statement in step.split(";"):  # executescript would commit first; so no ";" within a statement
                connection.execute(statement)
        if version < len(STEPS):
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {len(STEPS)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _check_version(connection: sqlite3.Connection, where: object) -> int:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != APPLICATION_ID and (application or num_tables):
        raise KVStoreUnusable(f"{where} is a database of another program; choose another folder for the KV store")
    if version > len(STEPS):
        raise KVStoreUnusable(
            f"{where} was written by a newer version of LayerStream (schema {version}, this one knows {len(STEPS)}): "
            "update layerstream, or choose another folder for the KV store"
        )
    wanted = {name for step in STEPS[:version] for name in _TABLE.findall(step)}
    there = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if wanted - there:
        raise sqlite3.DatabaseError(f"tables are missing: {', '.join(sorted(wanted - there))}")
    return version
