"""The database under the ledger: engines, transactions, migrations, and what a lost connection looks like."""

import fcntl
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite

from riverdelta.core.errors import BadInput, Corrupt, Refused, Unavailable

from .tables import metadata

MIGRATIONS = Path(__file__).with_name("migrations")
NEWEST = "0005"  # the last revision in migrations/versions
_BUSY_SECONDS = 30.0  # that a transaction waits for another's lock (SQLite)
_TRY_AGAIN_SECONDS = 0.001
# Of PostgreSQL: whether others may still see rows that were deleted before a transaction, and for how long to wait for
# them, and for those who hold the table: whoever comes meanwhile waits behind us. A transaction that has written keeps
# such rows until it ends, from any of the server's databases: no view begins after it, ours neither. A view that is
# held open keeps them from this database, or as a standby's or its slot's.
_OLDER = sa.text(
    "SELECT pg_snapshot_xmin(pg_current_snapshot()) <= CAST(:this AS xid8) OR EXISTS (SELECT FROM ("
    "SELECT backend_xmin FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
    "AND (datname = current_database() OR backend_type = 'walsender') "
    "UNION ALL SELECT xmin FROM pg_replication_slots) AS views(xmin) "
    "WHERE age(xmin) >= age(CAST(CAST(:this AS xid8) AS xid)))"
)
_OLDER_SECONDS, _LOOK_SECONDS = 10.0, 0.05
_LOCK_SECONDS = 2


def upsert(table: sa.Table, value: str) -> dict[bool, sa.Insert]:
    """What inserts rows, and where their keys exist replaces one value: for SQLite (True) and PostgreSQL, to be built
    once."""
    made: dict[bool, sa.Insert] = {}
    for on_sqlite, dialect in ((True, sqlite), (False, postgresql)):
        insert: Any = dialect.insert(table)
        keys = [column.name for column in table.primary_key]
        made[on_sqlite] = insert.on_conflict_do_update(index_elements=keys, set_={value: insert.excluded[value]})
    return made


class Database:
    """An SQLAlchemy engine with two kinds of transaction: `write` (serialised on SQLite) and `read`."""

    def __init__(self, url: str, what: str = "ledger") -> None:
        """`what` is what errors call it."""
        self.url, self._what = url, what
        self.sqlite = url.startswith("sqlite")
        if self.sqlite:
            Path(sa.make_url(url).database or "").parent.mkdir(parents=True, exist_ok=True)
        self._engine = sa.create_engine(url, **({} if self.sqlite else {"pool_pre_ping": True}))
        if self.sqlite:
            event.listen(self._engine, "connect", _set_up_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        self._hasty = self._engine.execution_options(hasty=True)
        self._reader = self._engine.execution_options(
            reading=True, **({} if self.sqlite else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True})
        )

    @contextmanager
    def write(self, durable: bool = True) -> Iterator[sa.Connection]:
        """One transaction that may write; on SQLite it holds the only write lock from its start. Without `durable` it
        does not wait for the disk: others see it at once, and only a crash of the whole machine can undo it."""
        with _told(self.url, self._what), (self._engine if durable else self._hasty).begin() as connection:
            if not durable and not self.sqlite:
                connection.execute(sa.text("SET LOCAL synchronous_commit TO off"))
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One consistent view."""
        with _told(self.url, self._what), self._reader.begin() as connection:
            yield connection

    def put(
        self,
        connection: sa.Connection,
        table: sa.Table,
        key: Mapping[str, Any],
        values: Mapping[str, Any],
        replace: bool = True,
    ) -> bool:
        """Insert a row; where its key exists, replace its values or leave them. Whether a row was written."""
        dialect: Any = sqlite if self.sqlite else postgresql
        insert = dialect.insert(table).values(**key, **values)
        if replace:
            insert = insert.on_conflict_do_update(index_elements=list(key), set_=dict(values))
        else:
            insert = insert.on_conflict_do_nothing(index_elements=list(key))
        # Not the count of rows: PostgreSQL's driver does not know it.
        return connection.execute(insert.returning(*(table.c[name] for name in key))).first() is not None

    def append(self, connection: sa.Connection, table: sa.Table, rows: Sequence[tuple[Any, ...]]) -> None:
        """Insert rows, given in the order of the table's columns: the driver's own way, for where there are many."""
        marks = ", ".join(["?" if self.sqlite else "%s"] * len(table.columns))
        connection.exec_driver_sql(f"INSERT INTO {table.name} VALUES ({marks})", list(rows))  # noqa: S608

    @contextmanager
    def exclusive(self, name: str) -> Iterator[bool]:
        """Whether this process alone now does what `name` says; held until the block ends or the process dies."""
        if self.sqlite:
            with Path(f"{sa.make_url(self.url).database}.{name}.lock").open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield False
                else:
                    yield True
        else:
            with _told(self.url, self._what), self._engine.connect() as opened:
                connection = opened.execution_options(isolation_level="AUTOCOMMIT")
                lock = sa.select(sa.func.pg_try_advisory_lock(sa.func.hashtext(name)))
                won = bool(connection.execute(lock).scalar())
                try:
                    yield won
                finally:
                    if won:
                        connection.execute(sa.select(sa.func.pg_advisory_unlock(sa.func.hashtext(name))))

    def watch(self, query: sa.Select[Any]) -> Callable[[], tuple[Any, ...] | None] | None:
        """On SQLite, what gives a query's one row if others have written since it last did, else None, for microseconds
        of work; belongs to the thread that made it. None elsewhere: there a look costs a round trip."""
        if not self.sqlite:
            return None
        asked = str(query.compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True}))
        raw: Any = sqlite3.connect(sa.make_url(self.url).database or "", timeout=0, isolation_level=None)
        seen = -1

        def look() -> tuple[Any, ...] | None:
            nonlocal seen
            with suppress(sqlite3.OperationalError):
                [(version,)] = raw.execute("PRAGMA data_version")
                if version != seen:
                    [row] = raw.execute(asked)
                    seen = version
                    return tuple(row)
            return None

        return look

    def migrate(self) -> None:
        """Create the tables, or bring an older ledger's up to date."""
        if self._revision() == NEWEST:
            return
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        with self.write() as connection:
            if not self.sqlite:  # processes that start together migrate one after the other
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext("migrate"))))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def _revision(self) -> str | None:
        """The ledger's revision, None for an empty database; `Corrupt` or `Refused` when it is no ledger of ours."""
        shown = sa.make_url(self.url).render_as_string(hide_password=True)
        with self.read() as connection:
            found = set(sa.inspect(connection).get_table_names())
            if "ledger_version" in found:
                revision = connection.execute(sa.text("SELECT version_num FROM ledger_version")).scalar()
            elif foreign := sorted(found & set(metadata.tables)):
                raise Corrupt(
                    f"{shown} is no ledger of Riverdelta's, though it has a table {foreign[0]}.",
                    "Give another data folder or ledger.",
                )
            else:
                return None
        if not list((MIGRATIONS / "versions").glob(f"{revision}_*.py")):
            raise Refused(f"The ledger {shown} was made by a newer Riverdelta ({revision}).", "Install that version.")
        return str(revision)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def scrub(self, table: str = "") -> None:
        """Let nothing that was deleted outlive it in SQLite's write-ahead log (`secure_delete` overwrites it in the
        database itself), or in this table of PostgreSQL's. `Unavailable` while a reader keeps it."""
        if not self.sqlite:
            if table:
                with _told(self.url, self._what):
                    self._rewrite(table)
        else:
            with _told(self.url, self._what), self._engine.connect() as connection:
                raw: Any = connection.connection.driver_connection
                connection.rollback()
                busy, *_ = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise Unavailable(f"The {self._what}'s write-ahead log is being read.", "It is emptied a little later.")

    def _rewrite(self, table: str) -> None:
        """Write a table anew: what was deleted or replaced stays in its file as dead rows, with whoever looks back to
        before that even in the new one."""
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            this = connection.execute(sa.text("SELECT pg_current_xact_id()::text")).scalar()
            until = time.monotonic() + _OLDER_SECONDS
            while connection.execute(_OLDER, {"this": this}).scalar():
                if time.monotonic() > until:
                    raise Unavailable(
                        f"A transaction older than this keeps what the {self._what} deleted.",
                        "Is a backup being made, or one open in another database of the server?",
                    )
                time.sleep(_LOOK_SECONDS)
            file = sa.select(sa.func.pg_relation_filenode(table))
            before = connection.execute(file).scalar()
            connection.execute(sa.text(f"SET lock_timeout = '{_LOCK_SECONDS}s'"))
            try:
                connection.execute(sa.text(f"VACUUM (FULL) {table}"))
            finally:
                connection.execute(sa.text("RESET lock_timeout"))
            if connection.execute(file).scalar() == before:  # who may not is only warned
                raise Refused(
                    f"The {self._what}'s table {table} was not written anew: this role is not its owner.",
                    f"Let it be: ALTER TABLE {table} OWNER TO the role.",
                )


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the begin hook below opens transactions, not the driver
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        f"busy_timeout={int(_BUSY_SECONDS * 1000)}",
        "secure_delete=ON",
        "foreign_keys=ON",
        "cache_size=-65536",  # 64 MiB: mentions are inserted all over their tree
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    if options.get("reading", False):
        connection.exec_driver_sql("BEGIN")
        return
    raw: Any = connection.connection.driver_connection
    raw.execute(f"PRAGMA synchronous={'NORMAL' if options.get('hasty', False) else 'FULL'}")
    # SQLite's own way to wait for the write lock sleeps longer and longer, up to a tenth of a second: an
    # acknowledgement would come that late.
    raw.execute("PRAGMA busy_timeout=0")
    until = time.monotonic() + _BUSY_SECONDS
    try:
        while True:
            try:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                return
            except sa.exc.OperationalError as error:
                if not _busy(error.orig) or time.monotonic() > until:
                    raise
            time.sleep(_TRY_AGAIN_SECONDS)
    finally:
        raw.execute(f"PRAGMA busy_timeout={int(_BUSY_SECONDS * 1000)}")


def _busy(error: BaseException | None) -> bool:
    return isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY


@contextmanager
def _told(url: str, what: str) -> Iterator[None]:
    shown = sa.make_url(url).render_as_string(hide_password=True)
    try:
        yield
    except UnicodeEncodeError as error:  # of an argument's bytes
        raise BadInput("A name is not UTF-8.", "Write it in UTF-8.") from error
    except sa.exc.OperationalError as error:
        raise Unavailable(
            f"The {what} {shown} does not answer: {error.orig}.", "Is it reachable, and not full?"
        ) from error
    except sa.exc.DatabaseError as error:
        if "malformed" in str(error.orig) or "not a database" in str(error.orig):
            raise Corrupt(f"The {what} {shown} is damaged: {error.orig}.", "Restore it from a backup.") from error
        raise
