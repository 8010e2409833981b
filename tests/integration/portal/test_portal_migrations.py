"""A database outlives releases: it is brought to the tables of each, with what is in it."""

import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from cxr_portal import migrations
from cxr_portal.store import DatabaseError, Store, open_store
from integration.portal.test_portal_api import GOOD
from integration.portal.test_portal_jobs import result, wait
from support.portals import portal, portal_command
from support.servers import Server, free_port

OLD = Path(__file__).with_name("schema_0001.sql")
# A step that makes a table anew, to which rows of others refer.
NEXT = """
import sqlalchemy as sa
from alembic import op

revision = "next"
down_revision = "{head}"


def upgrade():
    with op.batch_alter_table("jobs", recreate="auto") as jobs:
        jobs.alter_column("trace", type_=sa.Text)
        jobs.add_column(sa.Column("note", sa.Text))
"""


def engine(database: str) -> sa.Engine:
    return sa.create_engine(database.replace("postgresql:", "postgresql+psycopg:"))


@pytest.fixture
def old(database: str) -> str:
    """A database of before there were migrations, with a job: one answer, one image to go."""
    connected = engine(database)
    tables = OLD.read_text(encoding="utf-8")
    if connected.name == "postgresql":
        tables = tables.replace("DOUBLE", "DOUBLE PRECISION").replace("BLOB", "BYTEA")
    now = datetime.now(UTC).timestamp()
    job = {"id": "a-job", "owner": "local", "request_id": "r", "trace": "", "created": now}
    job |= {"expires": now + 3600, "total": 2, "cancelled": False}
    item = {"job_id": "a-job", "worker": "", "attempts": 0, "not_before": now, "lease": now}
    refused = '{"outcome":"refused","index":0,"reason":"empty","detail":"It is empty."}'
    rows = [
        ("jobs", job),
        ("job_images", item | {"index": 0, "state": "refused", "result": refused}),
        ("job_images", item | {"index": 1, "state": "queued", "result": None}),
        ("pending_images", {"job_id": "a-job", "index": 1, "data": GOOD}),
    ]
    with connected.begin() as connection:
        for statement in tables.split(";"):
            if statement.strip():
                connection.exec_driver_sql(statement)
        for name, row in rows:
            table = sa.table(name, *map(sa.column, row))
            connection.execute(sa.insert(table).values(row))
    connected.dispose()
    return database


@pytest.fixture
def later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes this process the next release, which has a step more."""
    steps = tmp_path / "steps"
    steps.mkdir()
    text = NEXT.replace("{head}", head())
    (steps / "next.py").write_text(text, encoding="utf-8")
    plain = migrations.config

    def config(connection: sa.Connection) -> Config:
        made = plain(connection)
        own = Path(migrations.__file__).with_name("versions")
        made.set_main_option("version_locations", f"{own};{steps}")
        made.set_main_option("path_separator", ";")
        return made

    return lambda: monkeypatch.setattr(migrations, "config", config)


def head() -> str:
    """This release's revision."""
    store = Store("sqlite://")
    store.close()
    return str(store.revisions[1])


def revision(database: str) -> str:
    connected = engine(database)
    with connected.connect() as connection:
        found: str = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    connected.dispose()
    return found


def test_jobs_of_the_first_release_are_kept_and_go_on(old: str, model: Server) -> None:
    with portal(f"--server={model.grpc}", database=old) as running, running.http() as http:
        done = wait(http, "a-job")
        assert (done["total"], done["answered"], done["refused"]) == (2, 1, 1)
        assert [image["outcome"] for image in result(http, "a-job")] == ["refused", "answered"]
    assert revision(old) == head()


def test_tables_and_models_agree(old: str) -> None:
    """However the database came to be; `alembic check` tells what differs."""
    Store(old).close()
    for database in (old, "sqlite://"):
        store = Store(database)
        with store._engine.connect() as connection:
            command.check(migrations.config(connection))
        store.close()


def test_the_command_tells_what_it_did(old: str) -> None:
    done = portal_command("migrate", f"--database={old}")
    assert (done.returncode, done.stdout) == (0, f"Revision {head()}; nothing to do.\n"), (
        done.stderr
    )
    assert revision(old) == head()


def test_the_command_makes_tables(database: str) -> None:
    done = portal_command("migrate", f"--database={database}")
    assert done.stdout == f"Revision {head()}, from an empty database.\n", done.stderr


def test_the_next_release_keeps_jobs_and_this_one_then_refuses(
    old: str, later: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    this = head()
    later()
    with ThreadPoolExecutor(4) as together:
        stores = list(together.map(lambda _: Store(old), range(4)))
    assert sorted(str(store.revisions[0]) for store in stores) == [this, *["next"] * 3]
    (job,) = stores[0].jobs("local")
    assert (job.total, job.refused) == (2, 1)
    (claim,) = stores[0].claim("somebody", 5)
    assert claim.data == GOOD
    assert stores[0].delete("local", job.id), "rows of other tables still refer to jobs"
    assert stores[0].open_images() == 0
    for store in stores:
        store.close()
    monkeypatch.undo()
    with pytest.raises(DatabaseError, match="A later release has used the database"):
        open_store(old)
    refused = portal_command("run", f"--database={old}", "--port=0", "--metrics-port=0")
    assert refused.returncode == 1
    assert "A later release has used the database" in refused.stderr


def test_who_opens_a_new_sqlite_database_waits_for_its_writer(tmp_path: Path) -> None:
    """Two processes make it at once, say the gateway and `cxr portal keys`."""
    path = tmp_path / "portal.db"
    with ThreadPoolExecutor(1) as beside, closing(sqlite3.connect(path)) as other:
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        opening = beside.submit(open_store, f"sqlite:///{path}")
        with pytest.raises(TimeoutError):
            opening.result(timeout=0.5)
        other.execute("COMMIT")
        store = opening.result(timeout=10)
    assert store.open_images() == 0
    store.close()


@pytest.mark.parametrize("command", ["run", "migrate"])
def test_what_the_driver_says_is_told_without_the_password(command: str) -> None:
    nowhere = f"postgresql://portal:s3cret@127.0.0.1:{free_port()}/portal"
    done = portal_command(command, f"--database={nowhere}")
    assert done.returncode == 1
    assert "The database cannot be used: connection failed: " in done.stderr
    assert "Connection refused" in done.stderr
    assert "s3cret" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_a_url_may_end_its_line(database: str) -> None:
    """As in a Secret that was made from a file."""
    open_store(f"{database}\n").close()
    assert revision(database) == head()


def test_a_step_that_fails_leaves_everything_as_it_was(
    old: str, later: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "steps" / "next.py"
    broken = path.read_text(encoding="utf-8") + '    op.drop_table("nothing")\n'
    path.write_text(broken, encoding="utf-8")
    later()
    with pytest.raises(DatabaseError, match="cannot be used"):
        open_store(old)
    monkeypatch.undo()
    store = open_store(old)
    assert [job.id for job in store.jobs("local")] == ["a-job"]
    store.close()
