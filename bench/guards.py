"""What guards find and what they let through, on a source that they were not fitted on.

usage: python bench/guards.py --data FOLDER --data FOLDER... [--recipe NAME] [--photographs FOLDER]

Each source in turn is left out: guards are fitted on the others, and asked about its images as
they are, filmed (askew, tinted, moire), turned, inverted and cut, about drawings, textures,
documents and noise with another seed, and about each photograph whole and in parts, in colour and
in grey. Prints a line of JSON for each source: the share of each kind that some
check flags, and that each check does.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from cxr.decode import DEFAULT_LIMITS, decode
from cxr.errors import BadImageError
from cxr.preprocess import preprocess
from cxr.quality import judged, pixel_scores
from cxr_training.backbones import Backbone
from cxr_training.data import build_manifest
from cxr_training.features import feature_network
from cxr_training.guards import Guards, copies, fit_guards
from cxr_training.guards.fit import SCORES
from cxr_training.recipes import load_recipe
from cxr_training.runs import recipe_backbone

SEED = 1
PARTS = 4


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--recipe", default="robust")
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--images", type=int, default=200, help="of each source, at most")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    assert recipe.guards is not None  # noqa: S101 - the shipped ones have them
    backbone = recipe_backbone(recipe)
    frame = build_manifest(arguments.data, progress=False).frame
    photographs = list(parts_of(arguments.photographs)) if arguments.photographs else []
    for source in sorted(set(frame["source"])):
        others = frame[frame["source"] != source]
        # A group that also has images in the source left out would make it known.
        others = others[~others["group"].isin(frame.loc[frame["source"] == source, "group"])]
        groups = others["group"].drop_duplicates().sample(frac=0.15, random_state=SEED)
        held_out = others["group"].isin(groups)
        start = time.perf_counter()
        guards = fit_guards(
            others[~held_out], others[held_out], backbone, images=recipe.guards.images, seed=SEED
        )
        seconds = time.perf_counter() - start
        unseen = frame[frame["source"] == source]
        unseen = unseen.sample(n=min(arguments.images, len(unseen)), random_state=SEED)
        found = asked(guards, backbone, unseen, photographs)
        report = {"left out": source, "recipe": recipe.name, "seconds to fit": seconds, **found}
        print(json.dumps(report), flush=True)


def asked(
    guards: Guards, backbone: Backbone, frame: pd.DataFrame, photographs: list[Image.Image]
) -> dict[str, dict[str, float]]:
    """Shares of each kind of image that are flagged, by some check and by each that flags any."""
    network = feature_network(backbone, 1000)
    rng = np.random.default_rng(SEED)
    spec = backbone.preprocessing

    def shares(images: Iterable[Image.Image]) -> dict[str, float]:
        found = []
        for image in images:
            features = network.run(preprocess(image, spec)[None])
            scores = dict(zip(SCORES, guards.scores(features)[0].tolist(), strict=True))
            reasons = judged(scores | pixel_scores(image, spec), guards.limits).reasons
            found.append(reasons)
        seen = sorted({reason for item in found for reason in item})
        named = {r.value: float(np.mean([r in item for item in found])) for r in seen}
        return {"images": len(found), "flagged": float(np.mean([bool(i) for i in found]))} | named

    def changed(
        change: Callable[[Image.Image, np.random.Generator], Image.Image],
    ) -> Iterable[Image.Image]:
        for path in frame["path"]:
            yield change(decode(Path(path).read_bytes(), DEFAULT_LIMITS, spec.draft), rng)

    result = {
        "as it is": shares(changed(lambda image, _: image)),
        "filmed": shares(changed(copies.filmed)),
        "rotated": shares(changed(copies.rotated)),
        "inverted": shares(changed(copies.inverted)),
        "part": shares(changed(copies.part)),
        "no radiograph": shares(copies.no_radiograph(rng) for _ in range(len(frame))),
    }
    if photographs:
        result["photographs"] = shares(photographs)
    return result


def parts_of(folder: Path) -> Iterable[Image.Image]:
    """Each photograph of a folder, whole and in parts, in colour and in grey."""
    for number, path in enumerate(sorted(folder.iterdir())):
        try:
            image = decode(path.read_bytes()).convert("RGB")
        except BadImageError:
            continue
        yield from (image, image.convert("L"))
        rng = np.random.default_rng(number)
        for count in range(PARTS):
            width, height = (int(side * rng.uniform(0.4, 0.8)) for side in image.size)
            left = int(rng.integers(0, image.width - width + 1))
            top = int(rng.integers(0, image.height - height + 1))
            part = image.crop((left, top, left + width, top + height))
            yield part if count % 2 else part.convert("L")


if __name__ == "__main__":
    main()
