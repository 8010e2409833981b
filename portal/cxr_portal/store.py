"""What outlives a request: API keys, jobs and idempotency keys, in one SQL database.

SQLite for one process, PostgreSQL for several. An image is in here only until it has its answer.
"""

import hashlib
import hmac
import json
import secrets
import sqlite3
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import StaticPool

from cxr_client.schemas import ImageResult, Job, JobState
from cxr_portal import migrations
from cxr_portal.settings import Scope

KEY_PREFIX = "cxr_"
_ID_BYTES = 6
_SECRET_BYTES = 32
# Seconds to wait for whoever writes to a SQLite database.
_SQLITE_WAIT_S = 10
# Any number that nobody else locks in the same database.
_SETUP_LOCK = 0x637872
# Seconds that a claim of an image lasts unless it is renewed.
LEASE = 6.0


class _Time(sa.TypeDecorator[datetime]):
    """A moment in UTC, as seconds: SQLite has no time zones."""

    impl = sa.Double
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: object) -> float | None:  # noqa: ARG002
        return None if value is None else value.timestamp()

    def process_result_value(self, value: float | None, dialect: object) -> datetime | None:  # noqa: ARG002
        return None if value is None else datetime.fromtimestamp(value, UTC)


class _Table(DeclarativeBase):
    type_annotation_map = {datetime: _Time, str: sa.String(255)}  # noqa: RUF012 - SQLAlchemy's


class _Key(_Table):
    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    # The first key of a chain of rotations: what the keys before have submitted stays theirs.
    owner: Mapped[str]
    name: Mapped[str]
    digest: Mapped[str]
    scopes: Mapped[str]
    images_per_minute: Mapped[int | None]
    created: Mapped[datetime]
    expires: Mapped[datetime | None]
    revoked: Mapped[datetime | None]


class _Job(_Table):
    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(index=True)
    request_id: Mapped[str]
    trace: Mapped[str]
    created: Mapped[datetime]
    expires: Mapped[datetime] = mapped_column(index=True)
    total: Mapped[int]
    cancelled: Mapped[bool]


class _Item(_Table):
    __tablename__ = "job_images"
    job_id: Mapped[str] = mapped_column(
        sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True
    )
    index: Mapped[int] = mapped_column(primary_key=True)
    # queued, running, or how it ended: answered, refused, failed, cancelled.
    state: Mapped[str] = mapped_column(sa.String(16), index=True)
    worker: Mapped[str]
    attempts: Mapped[int]
    not_before: Mapped[datetime]
    lease: Mapped[datetime]
    result: Mapped[str | None] = mapped_column(sa.Text)


class _Image(_Table):
    __tablename__ = "pending_images"
    job_id: Mapped[str] = mapped_column(
        sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True
    )
    index: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[bytes]


class _Idempotency(_Table):
    __tablename__ = "idempotency_keys"
    owner: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    created: Mapped[datetime]
    # When one whose answer is still missing may be taken over: its process has died.
    lease: Mapped[datetime]
    answer: Mapped[str | None] = mapped_column(sa.Text)


METADATA = _Table.metadata


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """An API key without its secret.

    Attributes:
        id: its public part.
        owner: the id of the key that it has followed by rotation; its own, if none.
        name: whose it is.
        scopes: what it allows.
        images_per_minute: its own limit, if it has one.
        created: when it was made.
        expires: from when it is no longer taken.
        revoked: since when it is not, whatever `expires` says.
    """

    id: str
    owner: str
    name: str
    scopes: frozenset[Scope]
    images_per_minute: int | None
    created: datetime
    expires: datetime | None
    revoked: datetime | None

    def valid(self, now: datetime) -> bool:
        """Whether it is taken."""
        return self.revoked is None and (self.expires is None or now < self.expires)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An image of a job that this process is to ask about.

    Attributes:
        attempts: how often the model has been asked before.
        request_id: of the request that submitted the job.
        trace: its `traceparent`.
    """

    job_id: str
    index: int
    data: bytes
    attempts: int
    request_id: str
    trace: str


class TooManyJobsError(Exception):
    """The owner has as many unfinished jobs as allowed."""


class DatabaseError(Exception):
    """The database cannot be used; the message says why."""


class IdempotencyError(Exception):
    """The same idempotency key came with another request, or its first request still runs."""

    def __init__(self, *, running: bool) -> None:
        super().__init__()
        self.running = running


class Store:
    """The database. Its methods block; call them in a thread.

    Attributes:
        revisions: that of its tables when it was opened, None where there were none, and now.
    """

    def __init__(self, url: str) -> None:
        """Open it, and bring its tables to this release.

        Args:
            url: SQLAlchemy's; plain `postgresql://` means the driver that is installed.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: it cannot be reached.
            migrations.LaterSchemaError: it belongs to a later release.
        """
        # From a file, as a Secret is, it may end with a line's end.
        parsed = make_url(url.strip())
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        self._sqlite = parsed.get_backend_name() == "sqlite"
        options: dict[str, Any] = {}
        if self._sqlite and parsed.database in (None, "", ":memory:"):
            options = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
        else:
            options = {"pool_pre_ping": not self._sqlite}
        # A failing statement's values, images among them, must not reach a log.
        self._engine = sa.create_engine(parsed, hide_parameters=True, **options)
        if self._sqlite:
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
        with self._engine.connect() as connection:
            if self._sqlite:
                # It changes a table by making a new one: rows that refer to the old one must stay.
                connection.connection.cursor().execute("PRAGMA foreign_keys=OFF")
            with connection.begin():
                if not self._sqlite:
                    # Gateways that start together must not take the same step; SQLite has one lock.
                    lock = sa.func.pg_advisory_xact_lock(_SETUP_LOCK)
                    connection.execute(sa.select(lock))
                self.revisions = migrations.upgrade(connection)
            if self._sqlite:
                connection.connection.cursor().execute("PRAGMA foreign_keys=ON")

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def ping(self) -> None:
        """Raise SQLAlchemyError where the database does not answer."""
        with self._engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))

    def scrub(self) -> None:
        """Do away with the last copies of what was deleted.

        SQLite overwrites it in the database; this empties its log, too.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database cannot be written to.
        """
        if self._sqlite:
            statement = "PRAGMA wal_checkpoint(TRUNCATE)"
            connection = self._engine.raw_connection()
            try:
                connection.cursor().execute(statement)
            except sqlite3.Error as error:
                raise DBAPIError(statement, None, error) from None
            finally:
                connection.close()

    @contextmanager
    def _session(self) -> Iterator[Session]:
        with Session(self._engine) as session, session.begin():
            yield session

    # API keys

    def create_key(
        self,
        name: str,
        scopes: frozenset[Scope],
        *,
        images_per_minute: int | None = None,
        lifetime: timedelta | None = None,
        owner: str | None = None,
    ) -> tuple[ApiKey, str]:
        """Make an API key.

        Args:
            name: whose it is.
            scopes: what it allows.
            images_per_minute: its own limit, if it has one.
            lifetime: until it expires, if it does.
            owner: the first key of those that it follows.

        Returns:
            The key, and its text, which is kept nowhere.
        """
        now = datetime.now(UTC)
        key_id, secret = secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES)
        row = _Key(
            id=key_id,
            owner=owner or key_id,
            name=name,
            digest=_digest(secret),
            scopes=" ".join(sorted(scopes)),
            images_per_minute=images_per_minute,
            created=now,
            expires=None if lifetime is None else now + lifetime,
            revoked=None,
        )
        with self._session() as session:
            session.add(row)
            key = _api_key(row)
        return key, f"{KEY_PREFIX}{key_id}_{secret}"

    def rotate_key(
        self, key_id: str, *, overlap: timedelta, lifetime: timedelta | None
    ) -> tuple[ApiKey, str] | None:
        """Make a key like that one, which then ends after `overlap`; None where it is not valid."""
        now = datetime.now(UTC)
        with self._session() as session:
            row = session.get(_Key, key_id)
            if row is None or not _api_key(row).valid(now):
                return None
            end = now + overlap
            row.expires = end if row.expires is None else min(end, row.expires)
            old = _api_key(row)
        return self.create_key(
            old.name,
            old.scopes,
            images_per_minute=old.images_per_minute,
            lifetime=lifetime,
            owner=old.owner,
        )

    def revoke_key(self, key_id: str) -> bool:
        """End a key now; False where there is none of that id."""
        with self._session() as session:
            row = session.get(_Key, key_id)
            if row is not None and row.revoked is None:
                row.revoked = datetime.now(UTC)
            return row is not None

    def all_keys(self) -> list[ApiKey]:
        """All API keys, the oldest first."""
        query = sa.select(_Key).order_by(_Key.created)
        with self._session() as session:
            return [_api_key(row) for row in session.scalars(query)]

    def find_key(self, text: str) -> ApiKey | None:
        """The key that this is the text of, valid or not."""
        key_id, _, secret = text.removeprefix(KEY_PREFIX).partition("_")
        with self._session() as session:
            row = session.get(_Key, key_id)
            # Compared where there is no row, too, so that the time tells nothing.
            same = hmac.compare_digest(row.digest if row else _digest(""), _digest(secret))
            return _api_key(row) if row is not None and same else None

    # Idempotency keys

    def begin_once(self, owner: str, key: str, fingerprint: str, lease: timedelta) -> str | None:
        """Begin a request with an idempotency key.

        Returns:
            The answer of the first such request; None where this one is the first.

        Raises:
            IdempotencyError: the key belongs to another request, or the first one still runs.
        """
        now = datetime.now(UTC)
        try:
            with self._session() as session:
                session.add(
                    _Idempotency(
                        owner=owner,
                        key=key,
                        fingerprint=fingerprint,
                        created=now,
                        lease=now + lease,
                        answer=None,
                    )
                )
        except IntegrityError:
            pass
        else:
            return None
        with self._session() as session:
            row = session.get(_Idempotency, (owner, key), with_for_update=True)
            if row is None:
                raise IdempotencyError(running=True) from None
            if row.fingerprint != fingerprint:
                raise IdempotencyError(running=False) from None
            if row.answer is None:
                if row.lease > now:
                    raise IdempotencyError(running=True) from None
                row.lease = now + lease
            return row.answer

    def end_once(self, owner: str, key: str, answer: str | None) -> None:
        """Keep the answer of a request with an idempotency key; None frees the key."""
        with self._session() as session:
            row = session.get(_Idempotency, (owner, key))
            if row is None:
                return
            if answer is None:
                session.delete(row)
            else:
                row.answer = answer

    # Jobs

    def submit(
        self,
        owner: str,
        images: Sequence[bytes | ImageResult],
        *,
        retention: timedelta,
        request_id: str,
        trace: str,
        max_active: int,
        idempotency_key: str = "",
    ) -> Job:
        """Take a job.

        Args:
            owner: whose it is.
            images: each encoded, or what is wrong with it already.
            retention: how long it is kept.
            request_id: of the request.
            trace: its `traceparent`.
            max_active: unfinished jobs that the owner may have, this one included.
            idempotency_key: of the request; its answer becomes the job's id.

        Raises:
            TooManyJobsError: the owner has as many.
        """
        now = datetime.now(UTC)
        job_id = str(uuid.uuid4())
        items, data = [], []
        for index, image in enumerate(images):
            refused = not isinstance(image, bytes)
            items.append(
                {
                    "job_id": job_id,
                    "index": index,
                    "state": "refused" if refused else "queued",
                    "worker": "",
                    "attempts": 0,
                    "not_before": now,
                    "lease": now,
                    "result": None if isinstance(image, bytes) else image.model_dump_json(),
                }
            )
            if isinstance(image, bytes):
                data.append({"job_id": job_id, "index": index, "data": image})
        with self._session() as session:
            if not self._sqlite:
                # Requests that come together must see each other's jobs; SQLite has one writer.
                lock = sa.func.pg_advisory_xact_lock(_SETUP_LOCK, sa.func.hashtext(owner))
                session.execute(sa.select(lock))
            if _unfinished(session, owner) >= max_active:
                raise TooManyJobsError
            session.add(
                _Job(
                    id=job_id,
                    owner=owner,
                    request_id=request_id,
                    trace=trace,
                    created=now,
                    expires=now + retention,
                    total=len(images),
                    cancelled=False,
                )
            )
            session.flush()
            session.execute(sa.insert(_Item), items)
            if data:
                session.execute(sa.insert(_Image), data)
            if idempotency_key and (row := session.get(_Idempotency, (owner, idempotency_key))):
                row.answer = job_id
            (job,) = _jobs(session, _Job.id == job_id)
        return job

    def unfinished(self, owner: str) -> int:
        """How many jobs of that owner are not finished."""
        with self._session() as session:
            return _unfinished(session, owner)

    def job(self, owner: str, job_id: str) -> Job | None:
        """A job of that owner."""
        with self._session() as session:
            return next(iter(_jobs(session, _Job.id == job_id, _Job.owner == owner)), None)

    def jobs(self, owner: str) -> list[Job]:
        """All jobs of that owner, the newest first."""
        with self._session() as session:
            return _jobs(session, _Job.owner == owner)

    def results(self, job_id: str) -> list[dict[str, Any]]:
        """What is known of a job's images, in their order, each as the API gives it."""
        query = (
            sa.select(_Item.result)
            .where(_Item.job_id == job_id, _Item.result.is_not(None))
            .order_by(_Item.index)
        )
        with self._session() as session:
            return [json.loads(result) for result in session.scalars(query) if result]

    def cancel(self, owner: str, job_id: str) -> Job | None:
        """Ask about no more images of a job; what is known stays. None where there is no such."""
        with self._session() as session:
            row = _lock(session, owner, job_id)
            if row is None:
                return None
            open_items = sa.and_(_Item.job_id == job_id, _Item.state.in_(("queued", "running")))
            stopped = session.execute(
                sa.update(_Item).where(open_items).values(state="cancelled", worker="")
            )
            if _count(stopped):
                row.cancelled = True
            session.execute(sa.delete(_Image).where(_Image.job_id == job_id))
            (job,) = _jobs(session, _Job.id == job_id)
            return job

    def delete(self, owner: str, job_id: str) -> bool:
        """Delete a job with everything in it; False where there is no such."""
        with self._session() as session:
            row = _lock(session, owner, job_id)
            if row is not None:
                session.delete(row)
            return row is not None

    def claim(self, worker: str, limit: int) -> list[Claim]:
        """Take images that nobody works on, in the order of their jobs.

        Jobs take turns, image by image: first comes the one that has waited for the longest. An
        image is given to one worker at a time, until its lease ends.
        """
        now = datetime.now(UTC)
        free = sa.or_(
            sa.and_(_Item.state == "queued", _Item.not_before <= now),
            sa.and_(_Item.state == "running", _Item.lease < now),
        )
        # A lease stays with an image that is done, so that it tells when one was taken last.
        served = (
            sa.select(sa.func.max(_Item.lease)).where(_Item.job_id == _Job.id).scalar_subquery()
        )
        has_free = sa.exists().where(_Item.job_id == _Job.id, free)
        turns = sa.select(_Job).where(has_free).order_by(served, _Job.created)
        claims: list[Claim] = []
        with self._session() as session:
            waiting = deque(session.scalars(turns))
            while waiting and len(claims) < limit:
                job = waiting.popleft()
                item = session.scalar(
                    sa.select(_Item)
                    .where(free, _Item.job_id == job.id)
                    .order_by(_Item.index)
                    .limit(1)
                    .with_for_update(skip_locked=True)
                )
                if item is None:
                    continue
                image = session.get(_Image, (item.job_id, item.index))
                if image is None:
                    continue
                waiting.append(job)
                item.state, item.worker = "running", worker
                item.lease = now + timedelta(seconds=LEASE)
                claims.append(
                    Claim(
                        job_id=item.job_id,
                        index=item.index,
                        data=image.data,
                        attempts=item.attempts,
                        request_id=job.request_id,
                        trace=job.trace,
                    )
                )
        return claims

    def renew(self, worker: str) -> set[tuple[str, int]]:
        """Make this worker's claims last longer.

        Returns:
            Job and place of the images that it still holds; others were cancelled.
        """
        mine = sa.and_(_Item.state == "running", _Item.worker == worker)
        with self._session() as session:
            lease = datetime.now(UTC) + timedelta(seconds=LEASE)
            session.execute(sa.update(_Item).where(mine).values(lease=lease))
            rows = session.execute(sa.select(_Item.job_id, _Item.index).where(mine))
            return {(job_id, index) for job_id, index in rows}

    def finish(self, worker: str, claim: Claim, result: ImageResult) -> bool:
        """Keep the answer to an image, and drop the image.

        Returns:
            False where the claim is no longer this worker's; then nothing is kept.
        """
        with self._session() as session:
            kept = session.execute(
                sa.update(_Item)
                .where(*_held(worker, claim))
                .values(
                    state=result.outcome,
                    worker="",
                    attempts=_Item.attempts + 1,
                    result=result.model_dump_json(),
                )
            )
            if not _count(kept):
                return False
            session.execute(
                sa.delete(_Image).where(_Image.job_id == claim.job_id, _Image.index == claim.index)
            )
            return True

    def put_back(self, worker: str, claim: Claim, *, delay: float, asked: bool) -> None:
        """Let an image wait for a later attempt.

        Args:
            worker: who holds it.
            claim: the image.
            delay: seconds until then, at least.
            asked: whether the model was asked and did not answer.
        """
        with self._session() as session:
            session.execute(
                sa.update(_Item)
                .where(*_held(worker, claim))
                .values(
                    state="queued",
                    worker="",
                    attempts=_Item.attempts + int(asked),
                    not_before=datetime.now(UTC) + timedelta(seconds=delay),
                )
            )

    def release(self, worker: str) -> None:
        """Give back all that a worker has claimed, for it ends."""
        with self._session() as session:
            session.execute(
                sa.update(_Item)
                .where(_Item.state == "running", _Item.worker == worker)
                .values(state="queued", worker="")
            )

    def open_images(self) -> int:
        """Images of jobs that have no answer yet."""
        with self._session() as session:
            query = sa.select(sa.func.count()).where(_Item.state.in_(("queued", "running")))
            return session.scalar(query) or 0

    def expire(self, retention: timedelta) -> int:
        """Delete what was kept long enough.

        Returns:
            The number of jobs.
        """
        now = datetime.now(UTC)
        with self._session() as session:
            session.execute(sa.delete(_Idempotency).where(_Idempotency.created < now - retention))
            return _count(session.execute(sa.delete(_Job).where(_Job.expires < now)))


def open_store(url: str) -> Store:
    """Open the database.

    Raises:
        DatabaseError: it cannot be used; the message leaves the URL out, which may hold a password.
    """
    try:
        return Store(url)
    except ModuleNotFoundError as error:
        raise DatabaseError(f"The database needs the package {error.name!r}.") from None
    except (ArgumentError, ValueError):
        raise DatabaseError(
            "The database's URL is not valid; it looks like sqlite:///portal.db or "
            "postgresql://user:password@host/name."
        ) from None
    except migrations.LaterSchemaError:
        raise DatabaseError(
            "A later release has used the database; use that one, or restore a backup."
        ) from None
    except SQLAlchemyError as error:
        raise DatabaseError(f"The database cannot be used: {_reason(error, url)}.") from None


def _reason(error: SQLAlchemyError, url: str) -> str:
    """Why a database cannot be used, without anything that is in it or a password."""
    # Of a statement's error, the driver's text may have values of rows.
    if not isinstance(error, DBAPIError) or error.statement is not None or error.orig is None:
        return type(error).__name__
    reason = " ".join(str(error.orig).split()).removesuffix(".")
    password = make_url(url.strip()).password
    return reason.replace(str(password), "***") if password else reason


def _prepare_sqlite(connection: Any, record: object) -> None:  # noqa: ARG001
    """Set what SQLite sets per connection: readers beside a writer, no trace of what is gone."""
    # Transactions begin as `_begin_sqlite` says, not when Python thinks so.
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout={1000 * _SQLITE_WAIT_S}")
    _write_ahead(connection)
    for pragma in ("synchronous=NORMAL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Let readers read beside a writer, and wait for whoever has the database.

    SQLite itself does not wait here: the first change turns a reader into a writer.
    """
    end = time.monotonic() + _SQLITE_WAIT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return


def _begin_sqlite(connection: sa.Connection) -> None:
    """Wait for other writers at the start: one that has only read cannot wait for them later."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _digest(secret: str) -> str:
    # A secret of 256 random bits needs no slow hash: there is nothing to guess.
    return hashlib.sha256(secret.encode()).hexdigest()


def _api_key(row: _Key) -> ApiKey:
    return ApiKey(
        id=row.id,
        owner=row.owner,
        name=row.name,
        scopes=frozenset(map(Scope, row.scopes.split())),
        images_per_minute=row.images_per_minute,
        created=row.created,
        expires=row.expires,
        revoked=row.revoked,
    )


def _held(worker: str, claim: Claim) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        _Item.job_id == claim.job_id,
        _Item.index == claim.index,
        _Item.state == "running",
        _Item.worker == worker,
    )


def _lock(session: Session, owner: str, job_id: str) -> _Job | None:
    query = sa.select(_Job).where(_Job.id == job_id, _Job.owner == owner).with_for_update()
    return session.scalar(query)


def _count(result: Any) -> int:
    count: int = result.rowcount
    return count


def _unfinished(session: Session, owner: str) -> int:
    return sum(not job.finished for job in _jobs(session, _Job.owner == owner))


def _jobs(session: Session, *where: sa.ColumnElement[bool]) -> list[Job]:
    rows = list(session.scalars(sa.select(_Job).where(*where).order_by(_Job.created.desc())))
    counted = session.execute(
        sa.select(_Item.job_id, _Item.state, sa.func.count())
        .where(_Item.job_id.in_([row.id for row in rows]))
        .group_by(_Item.job_id, _Item.state)
    )
    counts: dict[str, dict[str, int]] = {row.id: {} for row in rows}
    for job_id, state, number in counted:
        counts[job_id][state] = number
    return [_as_job(row, counts[row.id]) for row in rows]


def _as_job(row: _Job, counts: Mapping[str, int]) -> Job:
    unfinished = counts.get("queued", 0) + counts.get("running", 0)
    if row.cancelled:
        state = JobState.CANCELLED
    elif not unfinished:
        state = JobState.DONE
    elif unfinished == row.total and not counts.get("running"):
        state = JobState.QUEUED
    else:
        state = JobState.RUNNING
    return Job(
        id=row.id,
        state=state,
        total=row.total,
        answered=counts.get("answered", 0),
        refused=counts.get("refused", 0),
        failed=counts.get("failed", 0),
        cancelled=counts.get("cancelled", 0),
        created=row.created,
        expires=row.expires,
    )
