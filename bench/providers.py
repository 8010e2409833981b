"""Whether OpenVINO runs our graphs faster than ONNX Runtime's own CPU kernels.

OpenVINO comes as another build of ONNX Runtime, in an environment of its own; processes of the two
take turns. One image, one thread, as a worker runs them.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from bench import make_model, settings_of
from cxr.config import load_config
from report import replace_part
from subjects import PEERS, Subject, environment_of, ours, prepare

_BEGIN = "<!-- measured: written by make bench-openvino -->"
_OWN = "CPUExecutionProvider"
_OTHER = "OpenVINOExecutionProvider"


def main() -> None:
    """Measure, print, and write into the page."""
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    make_model(arguments)
    settings, _ = settings_of(arguments)
    own = ours("own", "inprocess")
    other = Subject("openvino", "", own.command, "", own.encode, "openvino")
    prepare(other, settings["fp32"])
    rows = []
    for graph, setting in settings.items():
        found: dict[str, dict[str, Any]] = {}
        side = str(load_config(setting.model).preprocessing.height)
        for _ in range(arguments.rounds):
            for provider, subject in ((_OWN, own), (_OTHER, other)):
                program, graph_file = PEERS / "provider.py", setting.model / "model.onnx"
                done = subprocess.run(
                    [subject.python(setting), program, graph_file, provider, side],
                    check=True,
                    capture_output=True,
                    text=True,
                    env=environment_of(subject, setting, 0),
                )
                told = json.loads(done.stdout)
                known = found.setdefault(provider, told | {"seconds": []})
                known["seconds"] += told["seconds"]
        base = np.median(found[_OWN]["seconds"])
        for provider, told in found.items():
            median = np.median(told["seconds"])
            rows.append(
                {
                    "graph": graph,
                    "provider": provider,
                    "ONNX Runtime": told["onnxruntime"],
                    "ms an image": f"{1e3 * median:.1f}",
                    "speed": f"{base / median:.2f}",
                }
            )
    table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    print(table)
    if arguments.page is not None:
        replace_part(arguments.page, table, begin=_BEGIN)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for models, environments")
    parser.add_argument("--data", type=Path, help="folder of images to train on; else phantoms")
    parser.add_argument("--page", type=Path, help="Markdown page to write the result into")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
