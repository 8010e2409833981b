import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from cxr_training.errors import TrainingError
from cxr_training.report_cli import track
from cxr_training.runs import Run
from cxr_training.tracking import Tracked, track_run


@pytest.fixture(scope="module")
def folder(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path_factory.mktemp("tracked") / "run"))


@pytest.fixture(scope="module")
def tracked(folder: Path) -> Tracked:
    note = folder.parent / "note.txt"
    note.write_text("further file", encoding="utf-8")
    return track_run(folder, extra=(note,))


def _logged(tracked: Tracked) -> Path:
    (found,) = Path(tracked.uri.removeprefix("file://")).glob(f"*/{tracked.run_id}")
    return found


def test_parameters_and_figures_are_logged(tracked: Tracked, run: Run) -> None:
    logged = _logged(tracked)
    assert (logged / "params" / "seed").read_text() == str(run.record.settings.seed)
    value = (logged / "metrics" / "test" / "accuracy").read_text().split()[1]
    assert float(value) == run.metrics.accuracy.value
    assert (logged / "metrics" / "test" / "accuracy.low").is_file()
    assert (logged / "metrics" / "test" / "COVID-19" / "sensitivity").is_file()


def test_files_are_logged_but_for_those_that_name_patients(tracked: Tracked) -> None:
    artifacts = _logged(tracked) / "artifacts"
    names = {path.name for path in (artifacts / "run").iterdir()}
    assert {"run.json", "metrics.json", "head.npz"} <= names
    assert (artifacts / "note.txt").is_file()
    assert not [path for path in artifacts.rglob("*") if path.suffix in (".parquet", ".csv")]


def test_what_an_earlier_run_left_in_the_folder_is_not_logged(
    run_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    for name in ("cv.json", "loso.json", "shortcuts.json"):
        (folder / name).write_text("of an earlier run", encoding="utf-8")
        os.utime(folder / name, (0, 0))
    logged = _logged(track_run(folder))
    names = {path.name for path in (logged / "artifacts" / "run").iterdir()}
    assert "run.json" in names
    assert not {"cv.json", "loso.json", "shortcuts.json"} & names


def test_each_run_is_a_new_version_of_the_registered_model(
    folder: Path, tracked: Tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (tracked.experiment, tracked.model_version) == ("phantom", "1")
    result = CliRunner().invoke(track, [str(folder), "--json"])
    assert result.exit_code == 0, result.output
    again = json.loads(result.stdout)
    assert again["model_version"] == "2"
    assert again["uri"] == tracked.uri == (folder.parent / "mlruns").as_uri()
    assert again["run_id"] != tracked.run_id
    assert not list(tmp_path.iterdir())


def test_a_store_of_unknown_kind_is_one_sentence(folder: Path) -> None:
    with pytest.raises(TrainingError, match="does not take the run"):
        track_run(folder, "nowhere://store")
