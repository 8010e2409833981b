"""`cxr serve --signature-policy`: who may say what is served."""

import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from cxr.signature import signature_path
from cxr_archive.signer import signer
from support.bundles import encoded_image
from support.keys import KeyPair, make_keys
from support.protocols import V1
from support.servers import Server, alive, serving

IMAGE = encoded_image(70)
PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def signed(archive: Path, keys: KeyPair, tmp_path: Path) -> Path:
    """A copy of the archive with its signature, in a folder as KServe hands it over."""
    path = tmp_path / "models" / "cxr.mar"
    path.parent.mkdir()
    shutil.copyfile(archive, path)
    signer(keys.private)(path)
    return path


def unsign(archive: Path) -> None:
    signature_path(archive).unlink()


def alter(archive: Path) -> None:
    """One byte more: still a whole archive to `cxr.mar.verify`."""
    with archive.open("ab") as file:
        file.write(b"x")


def sign_with_another_key(archive: Path) -> None:
    signer(make_keys(archive.parent, "another").private)(archive)


def answers(server: Server) -> bool:
    return httpx.post(server.rest + V1, content=IMAGE, headers=PNG).status_code == 200


def ends_cleanly(server: Server) -> None:
    tree = server.tree()
    assert server.terminate() == 0
    server.wait_for("no process left", lambda: not alive(tree), 5)
    assert list(server.folder.iterdir()) == []


class TestEnforce:
    def test_a_signed_archive_is_served_as_it_was_checked(
        self, signed: Path, keys: KeyPair
    ) -> None:
        """Even when somebody replaces the file while it loads."""
        options = ("--signature-policy=enforce", f"--verify-key={keys.public}", "--workers=1")
        with serving(signed.parent, *options, wait=False) as server:
            server.wait_for("the check", lambda: "cxr.mar is signed by" in server.log, 60)
            signed.write_bytes(b"altered")
            server.wait_ready()
            assert answers(server)
            ends_cleanly(server)

    @pytest.mark.parametrize(
        ("spoil", "reason"),
        [
            (unsign, "cxr.mar is unsigned: there is no cxr.mar.sig beside it; sign it with "),
            (alter, "cxr.mar is altered: it is not the file that cxr.mar.sig was made for; "),
            (sign_with_another_key, "cxr.mar is signed by another key than the one to verify "),
        ],
    )
    def test_any_other_archive_never_listens(
        self,
        signed: Path,
        keys: KeyPair,
        spoil: Callable[[Path], None],
        reason: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        spoil(signed)
        monkeypatch.setenv("CXR_SIGNATURE_POLICY", "enforce")
        monkeypatch.setenv("CXR_VERIFY_KEY", str(keys.public))
        with serving(signed, wait=False) as server:
            assert server.wait_exit() == 1
            assert server.stdout == ""
            # Nothing else was logged: neither listeners nor TorchServe were started.
            (line,) = server.log.splitlines()
            assert line.startswith(f"Error: {reason}")
            assert list(server.folder.iterdir()) == []


class TestWarn:
    def test_serves_and_says_what_is_wrong(self, signed: Path, keys: KeyPair) -> None:
        alter(signed)
        options = ("--signature-policy=warn", f"--verify-key={keys.public}", "--workers=1")
        with serving(signed, *options) as server:
            assert answers(server)
            (line,) = (line for line in server.log.splitlines() if " WARNING " in line)
            assert "cxr.mar is altered: " in line
            ends_cleanly(server)

    def test_a_wrong_key_is_no_fault_of_the_archive(self, signed: Path, keys: KeyPair) -> None:
        options = ("--signature-policy=warn", f"--verify-key={keys.private}")
        with serving(signed, *options, wait=False) as server:
            assert server.wait_exit() == 1
            (line,) = server.log.splitlines()
            assert "is not a public elliptic-curve key" in line
