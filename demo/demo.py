"""The whole line in one go: data, training, archive, server, and answers over REST and gRPC.

Each step is a `cxr` command that is printed before it runs, so that a reader can repeat it. The
answers come through the KServe SDK's clients, which know nothing of this project, and are compared
with the model asked in this process.
"""

import argparse
import asyncio
import base64
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from matplotlib.figure import Figure
from PIL import Image
from steps import CXR, cxr, load_json, step
from tabulate import tabulate

from cxr.answer import Prediction
from cxr.engine import Engine
from cxr_training.data import read_manifest

TOLERANCE = 1e-4
PER_CLASS = 4
STOP_SECONDS = 60


@dataclass(frozen=True)
class Case:
    """An image to ask about; `truth` is empty where nobody knows it."""

    path: Path
    truth: str


@dataclass(frozen=True)
class Result:
    """One image's answers, all as label and class probabilities."""

    case: Case
    label: str
    probabilities: dict[str, float]
    rest_difference: float
    grpc_difference: float
    same_label: bool


def main() -> int:
    """Run the demo; the exit code says whether every check held."""
    arguments = parse_arguments()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    for earlier in ("phantoms", "run", "bundle"):
        shutil.rmtree(out / earlier, ignore_errors=True)
    started = time.monotonic()

    data = arguments.data
    if data is None:
        data = out / "phantoms"
        step("No data given: drawing synthetic chest phantoms")
        cxr("data", "phantoms", data, "--patients-per-class", arguments.patients, "--seed", 0)
    step("Reading the images into a manifest: hashes, near-duplicates, groups")
    cxr("data", "manifest", data, "--out", out / "manifest.parquet")
    step("Training: frozen features, logistic regression, split by patient")
    # One collection, and no other hospital to be robust for.
    recipe = ("--recipe", "lite0-frozen")
    cxr("train", "--manifest", out / "manifest.parquet", *recipe, "--out", out / "run")
    cxr("evaluate", out / "run")
    step("Exporting one ONNX graph with its configuration")
    cxr("export", out / "run", "--out", out / "bundle")
    step("Packing the archive that TorchServe loads")
    archive = out / "cxr.mar"
    cxr("archive", out / "bundle", "--out", archive)

    step("Serving, and asking over REST and gRPC with the KServe SDK's clients")
    cases = choose_cases(out / "run" / "manifest.parquet", arguments.images)
    with served(archive) as endpoints:
        results = asyncio.run(ask(endpoints, out / "bundle", cases))
    synthetic = load_json(out / "bundle" / "cxr-model.json")["training_data"]["synthetic"]
    picture = out / "predictions.png"
    save_picture(results, picture, synthetic=synthetic)
    print(table(results))
    problems = check(results, out, arguments.min_accuracy)
    farewell(out, picture, time.monotonic() - started, synthetic=synthetic)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where results go")
    parser.add_argument("--data", type=Path, help="folder with real images; default: phantoms")
    parser.add_argument("--images", type=Path, help="folder with more images to ask about")
    parser.add_argument("--patients", type=int, default=40, help="phantom patients per class")
    parser.add_argument("--min-accuracy", type=float, default=0.0, help="fail below this")
    return parser.parse_args()


def choose_cases(manifest: Path, folder: Path | None) -> list[Case]:
    """Some images of each class that training has not seen, and all of `folder`."""
    frame = read_manifest(manifest)
    unseen = frame[frame["split"] == "test"]
    patients = unseen.drop_duplicates("group")
    chosen = patients.groupby("label").head(PER_CLASS).sort_values(["label", "path"])
    cases = [Case(Path(path), label) for path, label in chosen[["path", "label"]].to_numpy()]
    if folder is not None:
        cases += [Case(path, "") for path in sorted(folder.iterdir()) if path.is_file()]
    return cases


@contextmanager
def served(archive: Path) -> Iterator[dict[str, str]]:
    """Run `cxr serve` on free ports; it must stop cleanly afterwards."""
    command = ["serve", str(archive), "--json"]
    for port in ("rest", "grpc", "metrics"):
        command += [f"--{port}-port", "0"]
    print(f"$ cxr {shlex.join(command)} &", flush=True)
    log_path = archive.with_name("serve.log")
    with (
        log_path.open("wb") as log,
        subprocess.Popen([CXR, *command], stdout=subprocess.PIPE, stderr=log) as server,
    ):
        ready = server.stdout.readline() if server.stdout else b""
        if not ready:
            sys.exit(f"The server did not start; its log: {log_path}")
        try:
            yield json.loads(ready)
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(STOP_SECONDS)
    if code:
        sys.exit(f"The server ended with exit code {code}; its log: {log_path}")
    print("The server has stopped, exit code 0.")


async def ask(endpoints: dict[str, str], bundle: Path, cases: Sequence[Case]) -> list[Result]:
    """Ask about every image over REST V1, over gRPC V2, and in this process."""
    engine = Engine(bundle)
    results = []
    rest = InferenceRESTClient(RESTConfig(protocol="v1", retries=0, timeout=60))
    grpc = InferenceGRPCClient(endpoints["grpc"], timeout=60)
    for case in cases:
        image = case.path.read_bytes()
        body = {"instances": [{"b64": base64.b64encode(image).decode()}]}
        v1 = await rest.infer(endpoints["rest"], data=body, model_name=engine.name)
        tensor = InferInput("image", [1], "BYTES", data=[image])
        v2 = await grpc.infer(InferRequest(engine.name, [tensor]))
        expected = engine.predict([image])[0]
        if not isinstance(expected, Prediction):
            sys.exit(f"{case.path.name}: {expected}")
        over_rest = v1["predictions"][0]
        by_name = {output.name: output for output in v2.outputs}
        labels = json.loads(by_name["probabilities"].parameters["labels"].string_param)
        over_grpc = dict(zip(labels, by_name["probabilities"].as_numpy()[0], strict=True))
        grpc_label = by_name["label"].as_numpy()[0]
        results.append(
            Result(
                case,
                over_rest["label"],
                over_rest["probabilities"],
                difference(over_rest["probabilities"], expected.probabilities),
                difference(over_grpc, expected.probabilities),
                over_rest["label"] == expected.label == _text(grpc_label),
            )
        )
    await rest.close()
    return results


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def difference(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Largest difference of two sets of class probabilities."""
    return max(abs(float(a[label]) - float(b[label])) for label in b)


def table(results: Sequence[Result]) -> str:
    """Truth, label and probabilities of each image."""
    names = list(results[0].probabilities)
    rows = [
        [
            result.case.path.name[:40],
            result.case.truth,
            result.label,
            *(f"{result.probabilities[name]:.3f}" for name in names),
            f"{max(result.rest_difference, result.grpc_difference):.0e}",
        ]
        for result in results
    ]
    headers = ["image", "truth", "label", *(f"p({name})" for name in names), "max diff"]
    return "\n" + tabulate(rows, headers=headers, disable_numparse=True)


def check(results: Sequence[Result], out: Path, min_accuracy: float) -> list[str]:
    """What does not hold, in sentences; and print what does."""
    rest = max(result.rest_difference for result in results)
    grpc = max(result.grpc_difference for result in results)
    accuracy = load_json(out / "bundle" / "cxr-model.json")["metrics"]["accuracy"]
    print(
        f"\n{len(results)} images: largest probability difference to the in-process answer "
        f"{rest:.1e} over REST, {grpc:.1e} over gRPC.\n"
        f"Accuracy on the test split {accuracy['value']:.3f} "
        f"(95 % interval {accuracy['low']:.3f} to {accuracy['high']:.3f})."
    )
    problems = []
    if max(rest, grpc) > TOLERANCE or not all(result.same_label for result in results):
        problems.append("REST, gRPC and the in-process model do not agree.")
    if accuracy["value"] < min_accuracy:
        problems.append(f"The accuracy is below {min_accuracy}.")
    return problems


def save_picture(results: Sequence[Result], path: Path, *, synthetic: bool) -> None:
    """Draw the images with truth, label and probability."""
    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(3 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, result in zip(axes.flat, results, strict=False):
        with Image.open(result.case.path) as image:
            axis.imshow(image.convert("L"), cmap="gray")
        probability = result.probabilities[result.label]
        right = result.label == result.case.truth
        color = "black" if not result.case.truth else "darkgreen" if right else "firebrick"
        truth = f"\ntruth: {result.case.truth}" if result.case.truth else ""
        axis.set_title(f"{result.label} {probability:.2f}{truth}", fontsize=9, color=color)
    kind = "synthetic phantoms, " if synthetic else ""
    figure.suptitle(f"cxr-serve predictions ({kind}research use only)", fontsize=11)
    figure.savefig(path, dpi=80)


def farewell(out: Path, picture: Path, seconds: float, *, synthetic: bool) -> None:
    """Say where things are, and what to type next."""
    warning = "The model knows synthetic phantoms and nothing of real radiographs. " * synthetic
    print(
        f"""
Done in {seconds:.0f} s. {warning}Research use only: this is not a medical device.

  archive   {out / "cxr.mar"}
  model     {out / "bundle"}  (ONNX graph and configuration)
  metrics   {out / "run" / "metrics.json"}
  picture   {picture}

Next:
  . .venv/bin/activate
  cxr serve {out / "cxr.mar"}                  # REST 8080, gRPC 8081, metrics 8082
  cxr predict IMAGE...                         # in another terminal
  make demo DATA=FOLDER                        # the same on your images, a folder per class"""
    )


if __name__ == "__main__":
    sys.exit(main())
