"""The `cxr` command: a group whose subcommands come from the installed rooms."""

from importlib.metadata import EntryPoint, entry_points

import click

import cxr

_GROUP = "cxr.commands"


class _Rooms(click.Group):
    """Loads a subcommand when it is asked for, so that `cxr --help` stays quick."""

    def _found(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=_GROUP)}

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return sorted(self._found())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        entry = self._found().get(cmd_name)
        if entry is None:
            return None
        command = entry.load()
        assert isinstance(command, click.Command)  # noqa: S101 - our own entry points
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            raise click.ClickException(
                f"This command needs the package {error.name!r}, which is not installed; "
                "install the extras it belongs to, for instance: "
                'pip install "cxr-serve[training]", "cxr-serve[serving]", '
                '"cxr-serve[torchserve]", "cxr-serve[portal]", "cxr-serve[signing]", '
                '"cxr-serve[spark]" or "cxr-serve[loadtest]".'
            ) from error


@click.group(cls=_Rooms, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(cxr.__version__, prog_name="cxr-serve")
def main() -> None:
    """Train, archive and serve chest X-ray classifiers.

    Research use only: this is not a medical device.
    """
