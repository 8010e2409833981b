"""What alembic runs for each of its commands."""

from alembic import context

from cxr_portal.store import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    # SQLite changes a table by making a new one.
    render_as_batch=True,
)
context.run_migrations()
