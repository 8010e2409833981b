"""What explanations cost: one image from its bytes to its answer, with and without a heat map.

usage: python bench/explain.py BUNDLE IMAGE... [--rounds N] [--most RATIO]

Three answers are timed by turns, in one process and on one thread, by the processor's time, which
hardly depends on what else the machine does: by the graph without its branch
for explanations (what a model without them costs), by the whole graph without an explanation, and
with one. Prints medians and their ratios as JSON, and fails where an explained answer takes more
than RATIO times as long as a plain one.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import onnx

from cxr.answer import Options
from cxr.config import file_sha256, load_config
from cxr.engine import CONFIG_FILE, Engine


def without_explanation(bundle: Path, out: Path) -> Path:
    """A copy of a bundle whose graph has no branch for explanations."""
    config = load_config(bundle)
    if config.explanation is None:
        raise SystemExit(f"{bundle} has no explanation; export it again.")
    model = onnx.load(bundle / config.graph.file)
    graph, name = model.graph, config.explanation.output.name
    for values in (graph.input, graph.output, graph.node, graph.initializer):
        for value in list(values):
            if value.name in (name, config.explanation.switch):
                values.remove(value)
    onnx.save(model, out / config.graph.file)
    changed = config.graph.model_copy(update={"sha256": file_sha256(out / config.graph.file)})
    plain = config.model_copy(update={"graph": changed, "explanation": None})
    (out / CONFIG_FILE).write_text(plain.to_json(), encoding="utf-8")
    return out


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most", type=float, default=1.5, help="times a plain answer, at most")
    arguments = parser.parse_args()
    images = [path.read_bytes() for path in arguments.images]
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(arguments.bundle)
        asked = {
            "without": (Engine(without_explanation(arguments.bundle, Path(folder))), Options()),
            "plain": (engine, Options()),
            "explained": (engine, Options(explain=True)),
        }
        times: dict[str, list[float]] = {name: [] for name in asked}
        for number in range(arguments.rounds + 1):
            for image in images:
                for name, (model, options) in asked.items():
                    start = time.process_time()
                    model.predict([image], [options])
                    if number:  # the first round warms up
                        times[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["explained"] / medians["plain"]
    print(
        json.dumps(
            {
                "images": len(images),
                "rounds": arguments.rounds,
                "milliseconds": {name: round(1000 * value, 1) for name, value in medians.items()},
                "plain_to_without": round(medians["plain"] / medians["without"], 3),
                "explained_to_plain": round(ratio, 3),
            },
            indent=2,
        )
    )
    if ratio > arguments.most:
        raise SystemExit(
            f"An explained answer takes {ratio:.2f} times as long as a plain one; at most "
            f"{arguments.most:g} times were wanted."
        )


if __name__ == "__main__":
    main()
