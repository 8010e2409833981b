"""Packing a bundle, and refusing archives that are not whole."""

import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cxr.engine import CONFIG_FILE
from cxr.errors import ModelLoadError
from cxr.mar import CHECKSUMS, MANIFEST, digests, find_archive, verify
from cxr_archive.packager import CORE_MODULES, pack
from support.bundles import LABELS, graph_bytes, make_bundle

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def archive(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "cxr.mar"
    pack(bundle, path)
    return path


def read(archive: Path) -> Files:
    with zipfile.ZipFile(archive) as mar:
        return {name: mar.read(name) for name in mar.namelist()}


def write(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w") as mar:
        for name, data in files.items():
            mar.writestr(name, data)
    return path


def with_checksums(files: Files) -> Files:
    """The files with checksums that fit them, as a packager that erred would write them."""
    rest = {name: data for name, data in files.items() if name != CHECKSUMS}
    return rest | {CHECKSUMS: json.dumps(digests(rest)).encode()}


def refusal(archive: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        verify(archive)
    message = str(caught.value)
    assert archive.name in message
    return message


class TestPack:
    def test_layout(self, archive: Path, bundle: Path) -> None:
        files = read(archive)
        assert sorted(files) == sorted(
            [
                MANIFEST,
                CHECKSUMS,
                CONFIG_FILE,
                "model.onnx",
                "model-config.yaml",
                "cxr_handler.py",
                *(f"cxr/{module}" for module in CORE_MODULES),
            ]
        )
        assert files[CONFIG_FILE] == (bundle / CONFIG_FILE).read_bytes()
        assert files["model.onnx"] == graph_bytes()
        model = json.loads(files[MANIFEST])["model"]
        assert model["modelName"] == "cxr"
        assert model["modelVersion"] == "1.0"

    def test_the_same_bundle_gives_the_same_bytes(
        self, archive: Path, bundle: Path, tmp_path: Path
    ) -> None:
        pack(bundle, tmp_path / "again.mar")
        assert (tmp_path / "again.mar").read_bytes() == archive.read_bytes()

    def test_neither_place_nor_time_nor_rights_change_the_bytes(
        self, archive: Path, bundle: Path, tmp_path: Path
    ) -> None:
        moved = Path(shutil.copytree(bundle, tmp_path / "elsewhere" / "bundle"))
        for file in moved.iterdir():
            file.chmod(0o600)
            os.utime(file, (10**9, 10**9))
        (moved / "notes.txt").write_text("not part of the model", encoding="utf-8")
        pack(moved, tmp_path / "new" / "folder" / "moved.mar")
        assert (tmp_path / "new/folder/moved.mar").read_bytes() == archive.read_bytes()

    def test_another_model_gives_other_bytes(self, archive: Path, tmp_path: Path) -> None:
        pack(make_bundle(tmp_path / "b", version="1.1"), tmp_path / "other.mar")
        assert (tmp_path / "other.mar").read_bytes() != archive.read_bytes()

    def test_an_earlier_archive_is_replaced(self, bundle: Path, tmp_path: Path) -> None:
        path = tmp_path / "cxr.mar"
        path.write_bytes(b"earlier")
        pack(bundle, path)
        assert verify(path).name == "cxr"

    @pytest.mark.parametrize(
        "damage",
        [
            lambda bundle: (bundle / "model.onnx").unlink(),
            lambda bundle: (bundle / CONFIG_FILE).unlink(),
            lambda bundle: (bundle / "model.onnx").write_bytes(graph_bytes(size=32)),
            lambda bundle: (bundle / CONFIG_FILE).write_text("{}", encoding="utf-8"),
        ],
        ids=["no-graph", "no-config", "another-graph", "empty-config"],
    )
    def test_a_broken_bundle_leaves_no_file(
        self, damage: Callable[[Path], object], tmp_path: Path
    ) -> None:
        bundle = make_bundle(tmp_path / "bundle")
        damage(bundle)
        with pytest.raises(ModelLoadError):
            pack(bundle, tmp_path / "out" / "cxr.mar")
        assert list(tmp_path.rglob("*.mar*")) == []


class TestVerify:
    def test_returns_the_configuration(self, archive: Path) -> None:
        config = verify(archive)
        assert (config.name, config.version, config.labels) == ("cxr", "1.0", LABELS)

    @pytest.mark.parametrize("name", ["model.onnx", CONFIG_FILE, "cxr/decode.py", "cxr_handler.py"])
    def test_a_flipped_byte_is_found_in_any_file(
        self, archive: Path, tmp_path: Path, name: str
    ) -> None:
        data = bytearray(archive.read_bytes())
        content = read(archive)[name]
        data[data.index(content) + len(content) // 2] ^= 1
        damaged = tmp_path / "damaged.mar"
        damaged.write_bytes(data)
        assert name in refusal(damaged)

    @pytest.mark.parametrize("name", ["model.onnx", "cxr/decode.py", MANIFEST])
    def test_a_changed_file(self, archive: Path, tmp_path: Path, name: str) -> None:
        files = read(archive)
        path = write(tmp_path / "x.mar", files | {name: files[name] + b" "})
        assert f"{name} differs from what was archived" in refusal(path)

    @pytest.mark.parametrize(
        "name", ["model.onnx", "cxr_handler.py", "cxr/engine.py", MANIFEST, CHECKSUMS, CONFIG_FILE]
    )
    def test_a_removed_file(self, archive: Path, tmp_path: Path, name: str) -> None:
        files = read(archive)
        del files[name]
        assert name in refusal(write(tmp_path / "x.mar", files))

    def test_an_added_file(self, archive: Path, tmp_path: Path) -> None:
        path = write(tmp_path / "x.mar", read(archive) | {"sitecustomize.py": b"print()"})
        assert "sitecustomize.py differs" in refusal(path)

    @pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
    def test_a_truncated_archive(self, archive: Path, tmp_path: Path, kept: float) -> None:
        data = archive.read_bytes()
        path = tmp_path / "x.mar"
        path.write_bytes(data[: int(len(data) * kept)])
        assert "not a readable model archive" in refusal(path)

    def test_not_a_zip(self, tmp_path: Path) -> None:
        path = tmp_path / "x.mar"
        path.write_bytes(b"weights" * 100)
        assert "not a readable model archive" in refusal(path)

    def test_a_folder(self, tmp_path: Path) -> None:
        assert "not a readable model archive" in refusal(tmp_path)

    def test_no_file(self, tmp_path: Path) -> None:
        assert "There is no archive at" in refusal(tmp_path / "missing.mar")

    def test_an_archive_of_another_maker(self, tmp_path: Path) -> None:
        manifest = {"runtime": "python", "model": {"modelName": "densenet161"}}
        files = {MANIFEST: json.dumps(manifest).encode(), "model.py": b"", "weights.pt": b""}
        message = refusal(write(tmp_path / "densenet161.mar", files))
        assert "was not made by `cxr archive`" in message

    @pytest.mark.parametrize(
        ("key", "value"), [("modelName", "another"), ("modelVersion", "9.9"), ("modelName", None)]
    )
    def test_a_manifest_of_another_model(
        self, archive: Path, tmp_path: Path, key: str, value: object
    ) -> None:
        files = read(archive)
        manifest = json.loads(files[MANIFEST])
        manifest["model"][key] = value
        files[MANIFEST] = json.dumps(manifest).encode()
        message = refusal(write(tmp_path / "x.mar", with_checksums(files)))
        assert "mismatched" in message
        assert f"{key} {value!r}" in message

    @pytest.mark.parametrize("key", ["handler", "serializedFile"])
    def test_a_manifest_that_names_a_missing_file(
        self, archive: Path, tmp_path: Path, key: str
    ) -> None:
        files = read(archive)
        manifest = json.loads(files[MANIFEST])
        manifest["model"][key] = "missing.bin"
        files[MANIFEST] = json.dumps(manifest).encode()
        assert f"lacks the {key}" in refusal(write(tmp_path / "x.mar", with_checksums(files)))

    def test_a_configuration_of_another_graph(self, archive: Path, tmp_path: Path) -> None:
        files = read(archive) | {"model.onnx": graph_bytes(size=32)}
        message = refusal(write(tmp_path / "x.mar", with_checksums(files)))
        assert "model.onnx is not the graph of its configuration" in message

    @pytest.mark.parametrize("text", [b"{", b"[]", b"\xff"])
    @pytest.mark.parametrize("name", [MANIFEST, CHECKSUMS])
    def test_a_document_that_is_none(
        self, archive: Path, tmp_path: Path, name: str, text: bytes
    ) -> None:
        files = read(archive) | {name: text}
        if name == MANIFEST:
            files = with_checksums(files)
        message = refusal(write(tmp_path / "x.mar", files))
        assert f"{name} is not" in message

    def test_an_invalid_configuration(self, archive: Path, tmp_path: Path) -> None:
        files = with_checksums(read(archive) | {CONFIG_FILE: b"{}"})
        with pytest.raises(ModelLoadError, match="model configuration is not valid"):
            verify(write(tmp_path / "x.mar", files))

    def test_damage_anywhere_is_refused_or_harmless(self, archive: Path, tmp_path: Path) -> None:
        whole = archive.read_bytes()
        config = verify(archive)
        path = tmp_path / "x.mar"
        randomness = random.Random(0)  # noqa: S311 - not for secrets
        refused = 0
        for _ in range(300):
            data = bytearray(whole)
            # The end holds the zip's directory, where a flip changes how the rest is read.
            start = randomness.choice((0, len(data) - 1000))
            data[randomness.randrange(start, len(data))] ^= 1 << randomness.randrange(8)
            path.write_bytes(data)
            try:
                assert verify(path) == config
            except ModelLoadError:
                refused += 1
        assert refused > 150


class TestFindArchive:
    def test_a_file_is_itself(self, archive: Path) -> None:
        assert find_archive(archive) == archive

    @pytest.mark.parametrize("below", ["", "model-store", "a/b"])
    def test_the_only_archive_below_a_folder(self, tmp_path: Path, below: str) -> None:
        mar = tmp_path / below / "cxr.mar"
        mar.parent.mkdir(parents=True, exist_ok=True)
        mar.touch()
        (tmp_path / "README.txt").touch()
        assert find_archive(tmp_path) == mar

    def test_a_volume_of_a_config_map(self, tmp_path: Path) -> None:
        hidden = tmp_path / "..2026_01_31"
        hidden.mkdir()
        (hidden / "cxr.mar").touch()
        (tmp_path / "..data").symlink_to(hidden.name)
        (tmp_path / "cxr.mar").symlink_to("..data/cxr.mar")
        assert find_archive(tmp_path) == tmp_path / "cxr.mar"

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelLoadError, match=r"exactly one \.mar file, but holds: none"):
            find_archive(tmp_path)

    def test_two_archives(self, tmp_path: Path) -> None:
        (tmp_path / "a.mar").touch()
        (tmp_path / "b.mar").touch()
        with pytest.raises(ModelLoadError, match=r"holds: a\.mar, b\.mar"):
            find_archive(tmp_path)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModelLoadError, match="There is no archive at"):
            find_archive(tmp_path / "missing")
