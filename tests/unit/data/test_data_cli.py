"""`cxr data`: what it prints, what it writes, how it exits."""

import json

import pytest
from click.testing import CliRunner

from cxr_training.data import read_manifest
from cxr_training.data_cli import data


def run(*arguments):
    return CliRunner().invoke(data, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def manifest(phantom_tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "manifest.parquet"
    result = run("manifest", phantom_tree, "--out", path)
    assert result.exit_code == 0, result.output
    return path


def test_phantoms_to_split_in_four_commands(tmp_path):
    tree, manifest, split = (tmp_path / name for name in ("tree", "m.parquet", "s.parquet"))
    made = run("phantoms", tree, "--patients-per-class", 3, "--seed", 4)
    assert made.exit_code == 0
    assert "9 patients" in made.stdout
    built = run("manifest", tree, "--out", manifest, "--json")
    assert built.exit_code == 0
    report = json.loads(built.stdout)
    assert report["images"] == report["synthetic"] == len(read_manifest(manifest))
    assert report["patients"] == 9
    assert report["excluded"] == {}
    assigned = run("split", manifest, "--seed", 4, "--out", split, "--json")
    assert assigned.exit_code == 0, assigned.output
    counts = json.loads(assigned.stdout)
    frame = read_manifest(split)
    assert counts["seed"] == 4
    assert sum(part["images"] for part in counts["splits"].values()) == len(frame)
    assert (frame.groupby("group")["split"].nunique() == 1).all()
    shown = run("summary", split)
    assert shown.exit_code == 0


def test_manifest_names_what_it_left_out(tmp_path, make_image):
    make_image(tmp_path / "set/COVID/1.jpg", 1)
    make_image(tmp_path / "set/Normal/1.jpg", 2)
    (tmp_path / "set/Normal/broken.jpg").write_bytes(b"broken")
    result = run("manifest", tmp_path / "set", "--out", tmp_path / "m.parquet")
    assert result.exit_code == 0
    assert "Wrote 2 images in 2 groups" in result.stdout
    assert "Left out: 1 (unreadable)." in result.stdout


def test_summary_for_people_and_for_programs(manifest):
    text = run("summary", manifest)
    assert text.exit_code == 0
    for expected in ("phantom-clinic", "COVID-19", "Largest groups", "would leak", "SHA-256"):
        assert expected in text.stdout
    document = json.loads(run("summary", manifest, "--json").stdout)
    assert document["patients"] == 18
    assert document["largest_groups"][0]["images"] >= document["largest_groups"][-1]["images"]
    assert len(document["sha256"]) == 64


def test_audit_for_people_and_for_programs(manifest):
    text = run("audit", manifest, "--seed", 3)
    assert text.exit_code == 0, text.output
    for expected in ("phantom-clinic", "COVID-19", "same patient", "of 256 bits apart"):
        assert expected in text.stdout
    document = json.loads(run("audit", manifest, "--seed", 3, "--json").stdout)
    assert document["seeds"] == [3, 4, 5, 6, 7]
    assert document["total"]["patient"] <= document["total"]["any"]
    assert set(document["by_label"]) == {"COVID-19", "No finding", "Pneumonia"}


def test_manifest_and_split_for_another_task(phantom_tree, tmp_path):
    path, out = tmp_path / "m.parquet", tmp_path / "s.parquet"
    assert run("manifest", phantom_tree, "--task", "covid", "--out", path).exit_code == 0
    assert set(read_manifest(path)["label"]) == {"COVID-19", "Other"}
    assigned = run("split", path, "--kind", "random", "--out", out, "--json")
    assert json.loads(assigned.stdout)["kind"] == "random"
    frame = read_manifest(out)
    assert (frame.groupby("group")["split"].nunique() > 1).any()


def test_an_unknown_task_is_answered_with_the_known_ones(phantom_tree):
    result = run("manifest", phantom_tree, "--task", "cats")
    assert result.exit_code == 1
    assert "Unknown task 'cats'; choose covid, abnormal, three-class, four-class." in result.stderr


def test_split_prints_a_table_of_labels(manifest, tmp_path):
    result = run("split", manifest, "--out", tmp_path / "split.parquet")
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("train", "validation", "test", "Pneumonia"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("summary", "nowhere.parquet"),
        ("audit", "nowhere.parquet"),
        ("split", "nowhere.parquet", "--out", "out.parquet"),
        ("manifest", "nowhere"),
    ],
)
def test_data_errors_exit_1_with_one_sentence(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert "nowhere" in result.stderr
    assert result.stderr.count("\n") == 1


def test_output_that_cannot_be_written(phantom_tree, tmp_path):
    (tmp_path / "file").touch()
    result = run("manifest", phantom_tree, "--out", tmp_path / "file" / "m.parquet")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")


def test_phantoms_into_a_folder_in_use(tmp_path):
    (tmp_path / "mine.txt").touch()
    result = run("phantoms", tmp_path, "--patients-per-class", 1)
    assert result.exit_code == 1
    assert "not an empty folder" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("manifest",),
        ("split", "m.parquet"),
        ("split", "m.parquet", "--out", "s.parquet", "--seed", "-1"),
        ("phantoms", "p", "--patients-per-class", "0"),
    ],
)
def test_usage_errors_exit_2(arguments):
    assert run(*arguments).exit_code == 2


def test_an_unknown_layout_is_answered_with_the_known_ones():
    result = run("manifest", ".", "--layout", "nifti")
    assert result.exit_code == 1
    assert "folder-per-class" in result.stderr


@pytest.mark.parametrize("command", ["phantoms", "manifest", "summary", "audit", "split"])
def test_help_shows_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: cxr data {command}" in result.stdout
