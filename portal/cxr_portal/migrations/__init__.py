"""The steps by which the database came to its present tables, one a file in `versions`.

A step is never changed once it is released. While gateways are replaced one by one, those of the
release before still work on the new tables: a step adds, and a later release takes away.
"""

import logging

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

log = logging.getLogger(__name__)

# Databases that were made before there were steps have the tables of this one.
_FIRST = "0001"
_A_TABLE = "jobs"


class LaterSchemaError(Exception):
    """The database has been brought to the tables of a later release."""


def config(connection: sa.Connection) -> Config:
    """What alembic's commands need to work on that connection."""
    made = Config()
    made.set_main_option("script_location", "cxr_portal:migrations")
    made.attributes["connection"] = connection
    return made


def upgrade(connection: sa.Connection) -> tuple[str | None, str | None]:
    """Bring a database to this release's tables, in the transaction of that connection.

    Args:
        connection: in a transaction that keeps other gateways from doing the same.

    Returns:
        The database's revision before, None where it was empty, and after.

    Raises:
        LaterSchemaError: it belongs to a later release.
    """
    # It tells at length what it does at each start.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    context = MigrationContext.configure(connection)
    settings = config(connection)
    scripts = ScriptDirectory.from_config(settings)
    head = scripts.get_current_head()
    before = context.get_current_revision()
    if before is None and sa.inspect(connection).has_table(_A_TABLE):
        before = _FIRST
        command.stamp(settings, before)
    if before == head:
        return before, head
    if before is not None and before not in {step.revision for step in scripts.walk_revisions()}:
        raise LaterSchemaError
    command.upgrade(settings, "head")
    log.info("database upgraded from revision %s to %s", before or "none", head)
    return before, head
