"""A PostgreSQL server of a test's own, which can go away and come back."""

import os
import pwd
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from .brokers import free_port

_SERVERS = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(p).parent for p in [shutil.which("initdb")] if p]


class Postgres:
    """A server on the loopback interface; skips the test where there is none. `url` names no database."""

    def __init__(self) -> None:
        if not _SERVERS:
            pytest.skip("needs a PostgreSQL server")
        self._folder = Path("/tmp") / f"riverdelta-pg-{uuid.uuid4().hex[:8]}"
        self._folder.mkdir(mode=0o700)
        self._user: dict[str, Any] = {}
        if os.getuid() == 0:  # the server refuses to run as root
            account = pwd.getpwnam("postgres")
            os.chown(self._folder, account.pw_uid, account.pw_gid)
            self._user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        port = free_port()
        self.url = f"postgresql+psycopg://river@127.0.0.1:{port}"
        self._options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._folder}"
        self._call("initdb", "-D", str(self._folder / "data"), "-U", "river", "-A", "trust")
        self.start()

    def start(self) -> None:
        """Start it, with what was committed."""
        options = f"{self._options} -c fsync=off"
        self._call(
            "pg_ctl", "-D", str(self._folder / "data"), "-w", "-l", str(self._folder / "log"), "-o", options, "start"
        )

    def stop(self) -> None:
        """End it as in a crash."""
        self._call("pg_ctl", "-D", str(self._folder / "data"), "-m", "immediate", "stop")

    def holding(self, trace: bytes) -> set[str]:
        """The folders of the server's whose files hold a trace, once it has written all that it holds in memory."""
        engine = sa.create_engine(f"{self.url}/postgres", isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sa.text("CHECKPOINT"))
        engine.dispose()
        files = [path for path in (self._folder / "data").rglob("*") if path.is_file()]
        return {path.relative_to(self._folder / "data").parts[0] for path in files if trace in path.read_bytes()}

    def remove(self) -> None:
        """End it for good."""
        self.stop()
        shutil.rmtree(self._folder)

    def _call(self, tool: str, *arguments: str) -> None:
        command = [str(_SERVERS[-1] / tool), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self._folder, timeout=120, **self._user)


def fresh(server: str) -> str:
    """The URL of an empty database."""
    name = f"ledger_{uuid.uuid4().hex}"
    engine = sa.create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{server}/{name}"
