"""How far decoding at a fraction of the size (`preprocessing.decoding: scaled`) moves the answers.

usage: python bench/decoding.py ARCHIVE FOLDER [--jpeg] [--sides PIXELS...] [--most DIFFERENCE]

Each image file below the folder is answered by the archive's model twice, with every pixel decoded
and with what suffices. Prints as JSON how many labels change, by how much probabilities do, and
the milliseconds of decoding and preprocessing, and fails where a label changes or a probability by
more than DIFFERENCE.
"""

import argparse
import json
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from cxr.answer import Prediction, Stage
from cxr.decode import DEFAULT_LIMITS, decode
from cxr.engine import Engine
from cxr.errors import BadImageError
from cxr.mar import verify

_JPEG = (".jpg", ".jpeg")
_SUFFIXES = (*_JPEG, ".png", ".tif", ".tiff", ".dcm")


def main() -> None:
    """Compare, print, and fail where they differ."""
    arguments = parse_arguments()
    verify(arguments.archive)
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(arguments.archive) as mar:
            mar.extractall(folder)
        exact, scaled = Engine(Path(folder)), Engine(Path(folder))
    exact.preprocessing = replace(exact.preprocessing, decoding="exact")
    scaled.preprocessing = replace(scaled.preprocessing, decoding="scaled")
    differences: list[float] = []
    refused = moved = labels_changed = 0
    seconds: dict[str, list[float]] = {"exact": [], "scaled": []}
    for image in encoded_images(arguments):
        one, other = exact.predict([image])[0], scaled.predict([image])[0]
        if not (isinstance(one, Prediction) and isinstance(other, Prediction)):
            refused += 1
            continue
        moved += one.probabilities != other.probabilities
        labels_changed += one.label != other.label
        differences.append(
            max(abs(p - other.probabilities[label]) for label, p in one.probabilities.items())
        )
        for name, answer in (("exact", one), ("scaled", other)):
            times = answer.seconds
            seconds[name].append(times[Stage.DECODE] + times[Stage.PREPROCESS])
    if not differences:
        raise SystemExit(f"{arguments.folder} has no image that can be used.")
    largest = max(differences)
    print(
        json.dumps(
            {
                "images": len(differences),
                "refused": refused,
                "answered_otherwise": moved,
                "labels_changed": labels_changed,
                "largest_difference": round(largest, 4),
                "mean_difference": round(float(np.mean(differences)), 4),
                "milliseconds": {
                    name: round(1000 * float(np.mean(values)), 1)
                    for name, values in seconds.items()
                },
            },
            indent=2,
        )
    )
    if labels_changed or largest > arguments.most:
        raise SystemExit(
            f"Scaled decoding changes {labels_changed} labels, and a probability by {largest:.4f}; "
            f"no label and at most {arguments.most:g} were wanted."
        )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jpeg", action="store_true", help="also what is no JPEG file, as one")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=(), help="JPEG files of these sizes instead"
    )
    parser.add_argument("--most", type=float, default=0.02, help="of a probability")
    return parser.parse_args()


def encoded_images(arguments: argparse.Namespace) -> Iterator[bytes]:
    """The files as they are, or as JPEG files whose shorter side is so long."""
    for path in sorted(arguments.folder.rglob("*")):
        if path.suffix.lower() not in _SUFFIXES:
            continue
        data = path.read_bytes()
        if not arguments.sides:
            yield data
            if not arguments.jpeg or path.suffix.lower() in _JPEG:
                continue
        try:
            image = decode(data, DEFAULT_LIMITS)
        except BadImageError:
            continue  # it has been counted, or cannot be made larger or smaller
        for side in arguments.sides or (min(image.size),):
            ratio = side / min(image.size)
            size = (round(image.width * ratio), round(image.height * ratio))
            buffer = BytesIO()
            image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=95)
            yield buffer.getvalue()


if __name__ == "__main__":
    main()
