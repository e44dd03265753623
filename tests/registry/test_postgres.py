"""The ledger on a real PostgreSQL: the same machine of random acts, and writers that race."""

import os
import pwd
import shutil
import subprocess
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck
from hypothesis import settings as limits
from hypothesis.stateful import run_state_machine_as_test

from riverdelta.core.errors import Conflict
from riverdelta.core.recipe import Recipe
from riverdelta.registry.ledger import Ledger
from tests.brokers import free_port
from tests.registry.test_ledger_machine import LedgerMachine
from tests.registry.test_races import race

_SERVERS = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(p).parent for p in [shutil.which("initdb")] if p]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL of its own on the loopback interface: its SQLAlchemy URL, without a database name."""
    if not _SERVERS:
        pytest.skip("needs a PostgreSQL server")
    folder = Path("/tmp") / f"riverdelta-pg-{uuid.uuid4().hex[:8]}"
    folder.mkdir(mode=0o700)
    user: dict[str, object] = {}
    if os.getuid() == 0:  # the server refuses to run as root
        account = pwd.getpwnam("postgres")
        os.chown(folder, account.pw_uid, account.pw_gid)
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    port, tools = free_port(), _SERVERS[-1]
    data = folder / "data"

    def call(*command: str) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, timeout=120, **user)  # type: ignore[call-overload]

    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    call(str(tools / "initdb"), "-D", str(data), "-U", "river", "-A", "trust")
    call(str(tools / "pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start")
    try:
        yield f"postgresql+psycopg://river@127.0.0.1:{port}"
    finally:
        call(str(tools / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(folder)


def fresh(server: str) -> str:
    """The URL of an empty database."""
    name = f"ledger_{uuid.uuid4().hex}"
    engine = sa.create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{server}/{name}"


def test_random_acts_keep_every_invariant(server: str) -> None:
    class OnPostgres(LedgerMachine):
        where: ClassVar[str] = server

        def url(self) -> str:
            return fresh(self.where)

    run_state_machine_as_test(
        OnPostgres,
        settings=limits(
            max_examples=5,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_racing_writers_serialise(server: str) -> None:
    """Sixteen threads on as many connections make one adapter, and move it: one history comes out."""
    url = fresh(server)
    Ledger.open(url).close()
    made: list[str] = []
    refused: list[str] = []

    def work(number: int) -> None:
        ledger = Ledger.open(url)
        try:
            ledger.create("acme", Recipe(), f"writer-{number}")
            made.append(f"writer-{number}")
        except Conflict:
            refused.append(f"writer-{number}")
        for each in range(3):
            ledger.forget(f"{number}-{each}", f"{number:064x}", ["acme"], "op")
        ledger.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    ledger = Ledger.open(url)
    assert (len(made), len(refused)) == (1, 15)
    assert ledger.adapter("acme").epoch == 48
    assert [fact.seq for fact in ledger.facts("acme")] == list(range(1, 50))
    assert [fence.number for fence in ledger.fences(0)] == list(range(1, 49))
    ledger.close()


def test_writers_of_every_kind_serialise(server: str) -> None:
    race(fresh(server))


def test_one_process_at_a_time_is_exclusive(server: str) -> None:
    one = Ledger.open(fresh(server))
    other = Ledger.open(one.db.url)
    with one.db.exclusive("keeper") as alone, other.db.exclusive("keeper") as too:
        assert (alone, too) == (True, False)
    with other.db.exclusive("keeper") as alone:
        assert alone
    one.close()
    other.close()
