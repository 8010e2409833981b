import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import pandas as pd
import pytest
from click.testing import CliRunner

from cxr.config import load_config
from cxr_training import cli
from cxr_training.data import write_manifest
from cxr_training.recipes import Recipe
from cxr_training.runs import Run


@pytest.fixture
def manifest(frame: pd.DataFrame, tmp_path: Path) -> Path:
    file = tmp_path / "manifest.parquet"
    write_manifest(frame, file)
    return file


def test_train_prints_accuracy_with_its_interval(
    phantoms: Path, cache: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(
        cli.train,
        ["--data", str(phantoms), "--out", str(tmp_path / "run"), "--weights", "none",
         "--cache", str(cache)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search(
        r"^accuracy \d\.\d{3} \(95 % \d\.\d\d-\d\.\d\d\), \d+ images, \d+ groups, "
        r"test split by patient$",
        result.output,
        re.MULTILINE,
    )
    assert "Synthetic data" in result.output


def test_json_output_of_train_and_evaluate_agrees(
    manifest: Path, cache: Path, recipe: Recipe, tmp_path: Path
) -> None:
    out = str(tmp_path / "run")
    chosen = tmp_path / "tiny.yaml"
    chosen.write_text(recipe.model_dump_json(exclude_unset=True))
    options = ["--recipe", str(chosen), "--out", out, "--cache", str(cache), "--json"]
    trained = CliRunner().invoke(cli.train, ["--manifest", str(manifest), *options])
    evaluated = CliRunner().invoke(cli.evaluate, [out, "--cache", str(cache), "--json"])
    assert json.loads(trained.stdout)["metrics"] == json.loads(evaluated.stdout)
    assert json.loads(trained.stdout)["synthetic"] is True


def test_evaluate_prints_every_class_and_source(run_folder: Path, cache: Path) -> None:
    result = CliRunner().invoke(cli.evaluate, [str(run_folder), "--cache", str(cache)])
    assert result.exit_code == 0, result.output
    summary = json.loads((run_folder / "run.json").read_text())
    for word in [*summary["labels"], "sensitivity", "balanced accuracy", "bootstrap", "Synthetic"]:
        assert word in result.output


def test_export_writes_a_bundle_and_prints_the_parity(run_folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.export, [str(run_folder), "--out", str(tmp_path / "bundle")])
    assert result.exit_code == 0, result.output
    assert re.search(r"on \d+ test images: \d\.\de-\d\d in probability", result.output)
    assert load_config(tmp_path / "bundle").name == "phantom"


@pytest.mark.parametrize("given", [[], ["--data", "folder", "--manifest", "file"]])
def test_train_wants_either_folders_or_a_manifest(given: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.train, [*given, "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "either --data or --manifest" in result.output


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (cli.train, ["--data", "nowhere", "--out", "run"]),
        (cli.train, ["--manifest", "nowhere.parquet", "--out", "run"]),
        (cli.evaluate, ["nowhere"]),
        (cli.export, ["nowhere", "--out", "bundle"]),
    ],
)
def test_what_is_missing_is_told_in_one_line(
    command: click.Command, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command, arguments)
    assert list(tmp_path.iterdir()) == []
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: .*nowhere.*\n", result.output)


@pytest.mark.parametrize("option", [["--backbone", "unknown"], ["--weights", "gone.pt"]])
def test_train_names_the_option_it_cannot_use(
    manifest: Path, tmp_path: Path, option: list[str]
) -> None:
    arguments = ["--manifest", str(manifest), "--out", str(tmp_path / "run"), *option]
    result = CliRunner().invoke(cli.train, arguments)
    assert result.exit_code == 1
    assert option[1] in result.output
    assert not (tmp_path / "run").exists()


def test_help_is_quick_and_shows_an_example() -> None:
    script = (
        "import sys; from cxr_training import cli; from click.testing import CliRunner; "
        "print(*[CliRunner().invoke(c, ['--help']).output "
        "for c in (cli.train, cli.recipes, cli.evaluate, cli.export)]); "
        "assert not {'torch', 'sklearn', 'pandas', 'onnx'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.count("Example: cxr") == 4


@pytest.mark.parametrize(("temperature", "told"), [(20.0, True), (1.0, False)])
def test_a_temperature_at_its_bound_is_told(
    run: Run, temperature: float, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    head = run.record.head.model_copy(update={"temperature": temperature})
    cli._warn_temperature(replace(run, record=run.record.model_copy(update={"head": head})))
    assert ("ended at its bound, 20" in capsys.readouterr().out) == told


def test_a_split_is_called_by_patient_only_where_each_is_known(frame: pd.DataFrame) -> None:
    unknown = frame.assign(patient=frame["patient"].where(frame.index > 0, None))
    assert cli._unit(frame) == "patient"
    assert cli._unit(unknown) == "group"
    assert cli._unit(frame, "random") == cli._unit(unknown, "random") == "image"
