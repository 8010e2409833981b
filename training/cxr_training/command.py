"""What the commands of this room share: options, errors and JSON output."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

# Here, and not beside the recipes: those need pydantic and YAML, and `--help` must be quick.
DEFAULT_RECIPE = "robust"

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True,
    help="The same seed gives the same result.",
)  # fmt: skip
layout_option = click.option(
    "--layout", default="auto", show_default=True,
    help="How the folders are laid out: auto, ozturk, cohen, cxnet, chowdhury, dicom, phantom or "
    "folder-per-class.",
)  # fmt: skip
task_option = click.option(
    "--task", default="three-class", show_default=True,
    help="Classes to make of the findings: covid, abnormal, three-class or four-class.",
)  # fmt: skip


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn errors about data, models and files into one sentence and exit code 1."""
    # Imported here: pandas comes with it, and `--help` must be quick.
    from cxr.errors import ModelLoadError  # noqa: PLC0415
    from cxr_training.data import DataError  # noqa: PLC0415
    from cxr_training.errors import TrainingError  # noqa: PLC0415

    try:
        yield
    except (DataError, ModelLoadError, TrainingError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error}.") from error


def print_json(document: dict[str, object]) -> None:
    """Print one JSON object on standard output."""
    click.echo(json.dumps(document, ensure_ascii=False))
