"""Packs a bundle, the handler and the core modules into one reproducible `.mar`."""

import json
import zipfile
from collections.abc import Iterable
from datetime import datetime
from importlib import resources
from pathlib import Path

import cxr
from cxr.config import ModelConfig, load_config
from cxr.engine import CONFIG_FILE, Engine
from cxr.mar import CARD_FILE, CHECKSUMS, MANIFEST, digests

HANDLER = "cxr_handler.py"
MODEL_CONFIG = "model-config.yaml"
# What the handler imports; everything else of `cxr` stays out of the worker.
CORE_MODULES = (
    "__init__.py",
    "errors.py",
    "dicom.py",
    "decode.py",
    "preprocess.py",
    "answer.py",
    "explain.py",
    "quality.py",
    "engine.py",
)
TORCHSERVE_VERSION = "0.12.0"

# The earliest moment that a zip can hold: archives carry no time, so equal input gives equal bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_READ_ONLY_FILE = 0o644 << 16


def pack(bundle: Path, archive: Path) -> ModelConfig:
    """Make a `.mar` from a bundle.

    The bundle is loaded and asked once before it is packed. The archive appears whole or not at
    all.

    Args:
        bundle: folder with `cxr-model.json`, its graph and, if it has one, its `MODEL_CARD.md`, as
            `cxr export` writes it.
        archive: the file to write; its folder is made if needed.

    Returns:
        The model's configuration.

    Raises:
        ModelLoadError: the bundle is incomplete, damaged or does not fit together.
    """
    config = load_config(bundle)
    Engine(bundle).warm_up()
    files = _files(bundle, config)
    files[CHECKSUMS] = _json_bytes(digests(files))
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(archive.name + ".part")
    _write_zip(partial, files.items())
    partial.replace(archive)
    return config


def _files(bundle: Path, config: ModelConfig) -> dict[str, bytes]:
    core = resources.files(cxr)
    files = {f"cxr/{name}": core.joinpath(name).read_bytes() for name in CORE_MODULES}
    files[HANDLER] = resources.files("cxr_handlers").joinpath(HANDLER).read_bytes()
    files[MODEL_CONFIG] = resources.files("cxr_archive").joinpath(MODEL_CONFIG).read_bytes()
    files[CONFIG_FILE] = (bundle / CONFIG_FILE).read_bytes()
    files[config.graph.file] = (bundle / config.graph.file).read_bytes()
    if (bundle / CARD_FILE).is_file():
        files[CARD_FILE] = (bundle / CARD_FILE).read_bytes()
    files[MANIFEST] = _json_bytes(
        {
            "createdOn": datetime(*_EPOCH).strftime("%d/%m/%Y %H:%M:%S"),
            "runtime": "python",
            "model": {
                "modelName": config.name,
                "modelVersion": config.version,
                "serializedFile": config.graph.file,
                "handler": HANDLER,
                "configFile": MODEL_CONFIG,
            },
            "archiverVersion": TORCHSERVE_VERSION,
        }
    )
    return files


def _write_zip(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    # Stored, not deflated: weights hardly shrink, and zlib's output differs between versions.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as mar:
        for name, data in sorted(files):
            info = zipfile.ZipInfo(name, date_time=_EPOCH)
            info.create_system = 3  # Unix, wherever it is made
            info.external_attr = _READ_ONLY_FILE
            mar.writestr(info, data)


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
