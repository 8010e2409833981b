"""`cxr predict`: ask a running service."""

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from cxr_server.settings import GRPC_PORT, REST_PORT

_LOCAL = "127.0.0.1"


class AskError(Exception):
    """The service refused an image; the message is its sentence."""


@click.command(context_settings={"show_default": True})
@click.argument(
    "images", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--protocol", type=click.Choice(["rest", "grpc"]), default="rest")
@click.option(
    "--url",
    help="Address of the service.",
    show_default=f"http://{_LOCAL}:{REST_PORT}, for gRPC {_LOCAL}:{GRPC_PORT}",
)
@click.option("--model", default="cxr", help="Name of the model.")
@click.option("--timeout", default=60.0, type=click.FloatRange(0, min_open=True), help="Seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image.")
def predict(
    *,
    images: tuple[Path, ...],
    protocol: str,
    url: str | None,
    model: str,
    timeout: float,
    as_json: bool,
) -> None:
    """Ask a running service about IMAGES (JPEG, PNG, TIFF or DICOM files).

    \b
    cxr predict chest1.jpg chest2.png
    cxr predict --protocol grpc --url cxr.example.org:8081 --json *.png

    Exit code 0 when every image was answered, 1 when one was refused or the service was not
    reached.
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    connect = _rest if protocol == "rest" else _grpc
    default = f"http://{_LOCAL}:{REST_PORT}" if protocol == "rest" else f"{_LOCAL}:{GRPC_PORT}"
    ask = connect(url or default, model, timeout)
    refused = 0
    rows = []
    for image, answer in _answers(ask, images):
        refused += "error" in answer
        if as_json:
            click.echo(json.dumps({"image": str(image)} | answer))
        else:
            rows.append((image.name, answer))
    if rows:
        click.echo(_table(rows))
    if refused:
        sys.exit(1)


def _answers(
    ask: Callable[[bytes], dict[str, Any]], images: Iterable[Path]
) -> Iterable[tuple[Path, dict[str, Any]]]:
    for image in images:
        try:
            yield image, ask(image.read_bytes())
        except AskError as error:
            yield image, {"error": str(error)}


def _table(rows: list[tuple[str, dict[str, Any]]]) -> str:
    from tabulate import tabulate  # noqa: PLC0415 - keeps `cxr --help` fast

    return tabulate(
        [
            [
                name,
                answer.get("label", "refused"),
                ", ".join(f"{label} {p:.3f}" for label, p in answer["probabilities"].items())
                if "probabilities" in answer
                else answer["error"],
            ]
            for name, answer in rows
        ],
        headers=["image", "label", "probabilities"],
    )


def _rest(url: str, model: str, timeout: float) -> Callable[[bytes], dict[str, Any]]:
    if not url.startswith(("http://", "https://")):
        raise click.UsageError("--url must begin with http:// or https://")

    def ask(image: bytes) -> dict[str, Any]:
        request = urllib.request.Request(  # noqa: S310 - the scheme is checked above
            f"{url.rstrip('/')}/v1/models/{model}:predict",
            data=image,
            headers={"Content-Type": "application/octet-stream"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:  # noqa: S310
                document = json.load(response)
        except urllib.error.HTTPError as error:
            raise AskError(_sentence(error)) from error
        except OSError as error:
            raise click.ClickException(f"Cannot reach {url}: {error}") from error
        prediction: dict[str, Any] = document["predictions"][0]
        return prediction | {"model_version": document["model_version"]}

    return ask


def _sentence(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"])
    except (ValueError, KeyError, TypeError):
        return f"The service answered {error.code}."


def _grpc(url: str, model: str, timeout: float) -> Callable[[bytes], dict[str, Any]]:
    import numpy as np  # noqa: PLC0415 - keeps `cxr --help` fast
    from tritonclient.grpc import InferenceServerClient, InferInput  # noqa: PLC0415
    from tritonclient.utils import InferenceServerException  # noqa: PLC0415

    client = InferenceServerClient(url)

    def ask(image: bytes) -> dict[str, Any]:
        tensor = InferInput("image", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([image], dtype=np.object_))
        try:
            result = client.infer(model, [tensor], client_timeout=timeout)
        except InferenceServerException as error:
            if error.status() == "StatusCode.UNAVAILABLE":
                raise click.ClickException(f"Cannot reach {url}: {error.message()}") from error
            raise AskError(error.message()) from error
        labels = result.get_output("probabilities").parameters["labels"].string_param
        probabilities = result.as_numpy("probabilities")[0].tolist()
        return {
            "label": result.as_numpy("label")[0].decode(),
            "probabilities": dict(zip(json.loads(labels), probabilities, strict=True)),
            "model_version": result.get_response().model_version,
        }

    return ask
