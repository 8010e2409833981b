"""The model archive (`.mar`): its layout, and the check that it is whole before it serves.

A `.mar` is TorchServe's zip format. Ours also carries the SHA-256 of every other file, so that a
changed or missing one is found before any of its code runs.
"""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

from cxr.config import ModelConfig
from cxr.engine import CONFIG_FILE
from cxr.errors import ModelLoadError

MANIFEST = "MAR-INF/MANIFEST.json"
CHECKSUMS = "MAR-INF/cxr-checksums.json"
# For people; nothing reads it. It stands beside the configuration, in bundle and archive.
CARD_FILE = "MODEL_CARD.md"


def verify(archive: Path) -> ModelConfig:
    """Check an archive without running any of its code.

    Args:
        archive: a `.mar` file.

    Returns:
        The validated model configuration.

    Raises:
        ModelLoadError: not an archive of ours, damaged, or its parts do not belong together.
    """
    try:
        with zipfile.ZipFile(archive) as mar:
            files = {info.filename: mar.read(info) for info in mar.infolist() if not info.is_dir()}
    except FileNotFoundError as error:
        raise ModelLoadError(f"There is no archive at {archive}.") from error
    except Exception as error:  # zipfile raises many types for damaged data
        raise ModelLoadError(f"{archive.name} is not a readable model archive: {error}.") from error
    for name in (MANIFEST, CHECKSUMS, CONFIG_FILE):
        if name not in files:
            raise ModelLoadError(
                f"{archive.name} has no {name}; it was not made by `cxr archive`, or is damaged."
            )
    _check_digests(archive.name, files)
    config = ModelConfig.from_json(files[CONFIG_FILE])
    _check_parts(archive.name, files, config)
    return config


def digests(files: dict[str, bytes]) -> dict[str, str]:
    """SHA-256 of each file, by name, in name order."""
    return {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}


def find_archive(path: Path) -> Path:
    """The archive at `path`: the file itself, or the only `.mar` in or below that folder.

    KServe's storage initializer hands over a folder. Hidden folders do not count: a volume made of
    a ConfigMap or a Secret has its files in one, behind links.

    Raises:
        ModelLoadError: nothing there, or more than one archive.
    """
    if not path.is_dir():
        if not path.is_file():
            raise ModelLoadError(f"There is no archive at {path}.")
        return path
    found = sorted(
        mar
        for mar in path.rglob("*.mar")
        if not any(part.startswith(".") for part in mar.relative_to(path).parts)
    )
    if len(found) != 1:
        names = ", ".join(mar.name for mar in found) or "none"
        raise ModelLoadError(f"{path} must hold exactly one .mar file, but holds: {names}.")
    return found[0]


def _check_digests(archive: str, files: dict[str, bytes]) -> None:
    expected = _json_object(archive, CHECKSUMS, files[CHECKSUMS])
    actual = digests({name: data for name, data in files.items() if name != CHECKSUMS})
    if expected == actual:
        return
    changed = sorted(
        name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)
    )
    raise ModelLoadError(
        f"{archive} is damaged: {', '.join(changed)} differs from what was archived."
    )


def _check_parts(archive: str, files: dict[str, bytes], config: ModelConfig) -> None:
    model = _json_object(archive, MANIFEST, files[MANIFEST]).get("model")
    if not isinstance(model, dict):
        raise ModelLoadError(f"{archive}: {MANIFEST} names no model.")
    for key, value in (("modelName", config.name), ("modelVersion", config.version)):
        if model.get(key) != value:
            raise ModelLoadError(
                f"{archive} is mismatched: its manifest says {key} {model.get(key)!r}, "
                f"its configuration {value!r}."
            )
    for key in ("handler", "serializedFile"):
        if model.get(key) not in files:
            raise ModelLoadError(f"{archive} lacks the {key} that its manifest names.")
    graph = files.get(config.graph.file)
    if graph is None or hashlib.sha256(graph).hexdigest() != config.graph.sha256:
        raise ModelLoadError(
            f"{archive} is mismatched: {config.graph.file} is not the graph of its configuration."
        )


def _json_object(archive: str, name: str, data: bytes) -> dict[str, Any]:
    try:
        value: Any = json.loads(data)
    except ValueError as error:
        raise ModelLoadError(f"{archive}: {name} is not JSON.") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{archive}: {name} is not a JSON object.")
    return value
