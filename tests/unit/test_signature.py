"""Signatures of archives: who signed, and what was altered."""

import base64
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from model_signing import signing, verifying

from cxr.cli import main
from cxr.signature import KeyFileError, SignatureError, check, load_public_key, signature_path
from cxr_archive.packager import pack
from cxr_archive.signer import signer
from cxr_server.origin import checked_origin
from cxr_server.settings import Settings, SignaturePolicy
from support.bundles import make_bundle
from support.keys import KeyPair, make_keys, private_pem


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def other_keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("other"), "other")


@pytest.fixture
def signed(keys: KeyPair, tmp_path: Path) -> Path:
    """A signed file; to a signature any content is as good as an archive's."""
    path = tmp_path / "cxr.mar"
    path.write_bytes(b"an archive" * 1000)
    assert signer(keys.private)(path) == signature_path(path)
    return path


def verify(archive: Path, keys: KeyPair) -> None:
    check(archive, signature_path(archive), load_public_key(keys.public))


def refusal(archive: Path, keys: KeyPair) -> str:
    with pytest.raises(SignatureError) as caught:
        verify(archive, keys)
    return str(caught.value)


def edit(archive: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the signature's bundle."""
    path = signature_path(archive)
    bundle = json.loads(path.read_text(encoding="utf-8"))
    change(bundle)
    path.write_text(json.dumps(bundle), encoding="utf-8")


def swap_digest(bundle: dict[str, Any]) -> None:
    """The digest of another file in the statement, under the old proof."""
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    statement["predicate"]["resources"][0]["digest"] = "0" * 64
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    bundle["dsseEnvelope"]["payload"] = payload


def flip_proof(bundle: dict[str, Any]) -> None:
    (entry,) = bundle["dsseEnvelope"]["signatures"]
    proof = bytearray(base64.b64decode(entry["sig"]))
    proof[-1] ^= 1
    entry["sig"] = base64.b64encode(proof).decode()


class TestCheck:
    @pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
    def test_the_signer_is_recognised(self, tmp_path: Path, curve: ec.EllipticCurve) -> None:
        keys = make_keys(tmp_path, curve=curve)
        path = tmp_path / "cxr.mar"
        path.write_bytes(b"x")
        signer(keys.private)(path)
        verify(path, keys)

    def test_neither_name_nor_place_matters(self, signed: Path, keys: KeyPair) -> None:
        moved = signed.parent / "mnt" / "models" / "renamed.mar"
        moved.parent.mkdir(parents=True)
        signature_path(signed).replace(signature_path(moved))
        signed.replace(moved)
        verify(moved, keys)

    @pytest.mark.parametrize("at", [0, 5000, -1])
    def test_an_altered_archive(self, signed: Path, keys: KeyPair, at: int) -> None:
        data = bytearray(signed.read_bytes())
        data[at] ^= 1
        signed.write_bytes(data)
        assert refusal(signed, keys).startswith("cxr.mar is altered: ")

    @pytest.mark.parametrize("data", [b"", b"an archive" * 999, b"an archive" * 1000 + b" "])
    def test_another_length(self, signed: Path, keys: KeyPair, data: bytes) -> None:
        signed.write_bytes(data)
        assert refusal(signed, keys).startswith("cxr.mar is altered: ")

    def test_the_signature_of_another_archive(
        self, signed: Path, keys: KeyPair, tmp_path: Path
    ) -> None:
        other = tmp_path / "other.mar"
        other.write_bytes(b"another")
        signer(keys.private)(other).replace(signature_path(signed))
        assert refusal(signed, keys).startswith("cxr.mar is altered: ")

    def test_another_key(self, signed: Path, other_keys: KeyPair) -> None:
        assert refusal(signed, other_keys).startswith("cxr.mar is signed by another key ")

    def test_another_curve(self, signed: Path, tmp_path: Path) -> None:
        keys = make_keys(tmp_path, curve=ec.SECP384R1())
        assert refusal(signed, keys).startswith("cxr.mar is signed by another key ")

    def test_another_key_that_claims_to_be_ours(
        self, signed: Path, keys: KeyPair, other_keys: KeyPair
    ) -> None:
        """What a bundle says of its key is not signed, and must not count."""
        claim = json.loads(signature_path(signed).read_text())["verificationMaterial"]
        signer(other_keys.private)(signed)
        edit(signed, lambda bundle: bundle.update(verificationMaterial=claim))
        assert refusal(signed, keys).startswith("cxr.mar.sig is altered: ")

    def test_no_signature(self, signed: Path, keys: KeyPair) -> None:
        signature_path(signed).unlink()
        assert refusal(signed, keys).startswith(
            "cxr.mar is unsigned: there is no cxr.mar.sig beside it; "
        )

    @pytest.mark.parametrize("change", [swap_digest, flip_proof])
    def test_an_altered_signature(
        self, signed: Path, keys: KeyPair, change: Callable[[dict[str, Any]], None]
    ) -> None:
        edit(signed, change)
        assert refusal(signed, keys).startswith("cxr.mar.sig is altered: its content ")

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"{}",
            b"[]",
            b"null",
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"dsseEnvelope": {"payload": "e30=", "signatures": []}}',
            b'{"dsseEnvelope": {"payload": "e30=", "signatures": [{"sig": "!"}]}}',
            b'{"dsseEnvelope": {"payload": 7, "signatures": [{"sig": "e30="}]}}',
        ],
        ids=[
            "empty",
            "no-members",
            "list",
            "null",
            "not-text",
            "deep",
            "no-proof",
            "not-base64",
            "not-a-string",
        ],
    )
    def test_garbage(self, signed: Path, keys: KeyPair, data: bytes) -> None:
        signature_path(signed).write_bytes(data)
        assert refusal(signed, keys).startswith("cxr.mar.sig is altered: it is not a signature ")

    def test_a_folder(self, signed: Path, keys: KeyPair) -> None:
        signature_path(signed).unlink()
        signature_path(signed).mkdir()
        assert refusal(signed, keys).startswith("Cannot read cxr.mar.sig: ")

    def test_damage_anywhere_is_refused_or_harmless(self, signed: Path, keys: KeyPair) -> None:
        """No flip of a bit in the envelope gets an altered archive through, or a traceback."""
        whole = signature_path(signed).read_bytes()
        signed.write_bytes(b"altered")
        for index in range(0, len(whole), 7):
            data = bytearray(whole)
            data[index] ^= 1 << index % 8
            signature_path(signed).write_bytes(data)
            refusal(signed, keys)

    @pytest.mark.parametrize("shards", [False, True], ids=["folder", "shards"])
    def test_what_signs_something_else_than_one_file(
        self, signed: Path, keys: KeyPair, shards: bool
    ) -> None:
        config = signing.Config().use_elliptic_key_signer(private_key=keys.private)
        target = signed
        if shards:
            config._hashing_config.use_shard_serialization()
        else:
            target = signed.parent / "folder"
            target.mkdir()
            (target / signed.name).write_bytes(signed.read_bytes())
        config.sign(target, signature_path(signed))
        assert "does not sign one file by its SHA-256" in refusal(signed, keys)


class TestInterchange:
    """The format is model-signing's own: each side reads what the other writes."""

    def test_model_signing_accepts_ours(self, signed: Path, keys: KeyPair) -> None:
        config = verifying.Config().use_elliptic_key_verifier(public_key=keys.public)
        config.verify(signed, signature_path(signed))
        signed.write_bytes(b"altered")
        with pytest.raises(ValueError, match="mismatch"):
            config.verify(signed, signature_path(signed))

    def test_the_signature_of_its_command_is_accepted(self, signed: Path, keys: KeyPair) -> None:
        signature_path(signed).unlink()
        files = ("--private_key", keys.private, "--signature", signature_path(signed))
        command = (sys.executable, "-m", "model_signing", "sign", "key", signed, *files)
        subprocess.run(command, check=True, capture_output=True)
        verify(signed, keys)


def wrong_keys() -> dict[str, bytes]:
    """Private keys that cannot sign."""
    return {
        "empty": b"",
        "text": b"not a key",
        "rsa": private_pem(rsa.generate_private_key(public_exponent=65537, key_size=2048)),
        "ed25519": private_pem(ed25519.Ed25519PrivateKey.generate()),
        "curve": private_pem(ec.generate_private_key(ec.SECP256K1())),
    }


class TestKeyFiles:
    @pytest.mark.parametrize("kind", ["empty", "text", "rsa", "ed25519", "curve"])
    def test_wrong_private_keys(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "key.pem"
        path.write_bytes(wrong_keys()[kind])
        with pytest.raises(KeyFileError, match="is not a private elliptic-curve key"):
            signer(path)

    @pytest.mark.parametrize("kind", ["empty", "text", "rsa", "ed25519", "curve"])
    def test_wrong_public_keys(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "key.pem"
        path.write_bytes(wrong_keys()[kind])
        with pytest.raises(KeyFileError, match="is not a public elliptic-curve key"):
            load_public_key(path)

    def test_the_halves_are_not_mixed_up(self, keys: KeyPair) -> None:
        with pytest.raises(KeyFileError, match="is not a private elliptic-curve key"):
            signer(keys.public)
        with pytest.raises(KeyFileError, match="is not a public elliptic-curve key"):
            load_public_key(keys.private)

    def test_a_public_key_of_another_curve(self, tmp_path: Path) -> None:
        keys = make_keys(tmp_path, curve=ec.SECP256K1())
        with pytest.raises(KeyFileError, match="P-256, P-384 or P-521"):
            load_public_key(keys.public)

    def test_a_password(self, tmp_path: Path) -> None:
        path = tmp_path / "key.pem"
        path.write_bytes(private_pem(ec.generate_private_key(ec.SECP256R1()), b"secret"))
        with pytest.raises(KeyFileError, match="is protected by a password"):
            signer(path)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(KeyFileError, match=r"Cannot read the key .*No such file"):
            signer(tmp_path / "missing.pem")
        with pytest.raises(KeyFileError, match=r"Cannot read the key .*Is a directory"):
            load_public_key(tmp_path)


class TestPolicy:
    """What the server loads."""

    @pytest.mark.parametrize("policy", [SignaturePolicy.WARN, SignaturePolicy.ENFORCE])
    def test_a_change_after_the_check_is_not_loaded(
        self, signed: Path, keys: KeyPair, policy: SignaturePolicy
    ) -> None:
        data = signed.read_bytes()
        settings = Settings(signature_policy=policy, verify_key=keys.public)
        with checked_origin(signed, settings) as checked:
            signed.write_bytes(b"altered")
            assert checked.read_bytes() == data
            assert checked.name == signed.name
            assert checked.parent.stat().st_mode & 0o077 == 0
        assert not checked.parent.exists()

    def test_a_link_is_what_it_points_to(self, signed: Path, keys: KeyPair) -> None:
        """Volumes of Kubernetes hold links; the signature is beside the link."""
        data = signed.read_bytes()
        signed.rename(signed.with_name("..data"))
        signed.symlink_to("..data")
        settings = Settings(signature_policy=SignaturePolicy.ENFORCE, verify_key=keys.public)
        with checked_origin(signed, settings) as checked:
            assert not checked.is_symlink()
            assert checked.read_bytes() == data

    def test_a_refused_archive_leaves_no_copy(
        self, signed: Path, keys: KeyPair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = signed.parent / "tmp"
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        signature_path(signed).unlink()
        settings = Settings(signature_policy=SignaturePolicy.ENFORCE, verify_key=keys.public)
        with pytest.raises(SignatureError), checked_origin(signed, settings):
            pytest.fail("it was let through")
        assert list(folder.iterdir()) == []

    def test_off_looks_at_nothing(self, tmp_path: Path) -> None:
        """Nor does it load the library: an environment without it serves."""
        code = """
import sys
from pathlib import Path
from cxr_server.origin import checked_origin
from cxr_server.settings import Settings
with checked_origin(Path("cxr.mar"), Settings()) as checked:
    assert checked == Path("cxr.mar")
assert not {"cryptography", "model_signing"} & set(sys.modules)
"""
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


class TestCommand:
    def test_signs_and_checks(self, bundle: Path, keys: KeyPair, tmp_path: Path) -> None:
        out = tmp_path / "cxr.mar"
        result = run("archive", bundle, "--out", out, "--sign", keys.private)
        assert result.exit_code == 0, result.output
        assert f"signed  {out}.sig" in result.output
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cxr.mar", "cxr.mar.sig"]
        pack(bundle, tmp_path / "unsigned.mar")
        assert out.read_bytes() == (tmp_path / "unsigned.mar").read_bytes()

        result = run("archive", "--check", out, "--verify-key", keys.public, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.output)["signature"] == f"{out}.sig"

    def test_an_earlier_signature_is_replaced(
        self, bundle: Path, keys: KeyPair, other_keys: KeyPair, tmp_path: Path
    ) -> None:
        out = tmp_path / "cxr.mar"
        for pair in (other_keys, keys):
            assert run("archive", bundle, "--out", out, "--sign", pair.private).exit_code == 0
        assert run("archive", "--check", out, "--verify-key", keys.public).exit_code == 0

    def test_a_refusal_is_one_sentence(
        self, bundle: Path, keys: KeyPair, other_keys: KeyPair, tmp_path: Path
    ) -> None:
        out = tmp_path / "cxr.mar"
        pack(bundle, out)
        result = run("archive", "--check", out, "--verify-key", keys.public)
        assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
        assert result.output.startswith("Error: cxr.mar is unsigned: ")
        run("archive", bundle, "--out", out, "--sign", other_keys.private)
        result = run("archive", "--check", out, "--verify-key", keys.public)
        assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
        assert result.output.startswith("Error: cxr.mar is signed by another key ")

    @pytest.mark.parametrize("kind", ["missing", "public", "text"])
    def test_a_bad_key_leaves_no_file(
        self, bundle: Path, keys: KeyPair, tmp_path: Path, kind: str
    ) -> None:
        text = tmp_path / "text.pem"
        text.write_text("not a key")
        key = {"missing": tmp_path / "missing.pem", "public": keys.public, "text": text}[kind]
        result = run("archive", bundle, "--out", tmp_path / "new" / "cxr.mar", "--sign", key)
        assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
        assert result.output.startswith("Error: ")
        assert list(tmp_path.iterdir()) == [text]

    def test_a_signature_that_cannot_be_written_is_one_sentence(
        self, bundle: Path, keys: KeyPair, tmp_path: Path
    ) -> None:
        (tmp_path / "cxr.mar.sig").mkdir()
        result = run("archive", bundle, "--out", tmp_path / "cxr.mar", "--sign", keys.private)
        assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
        assert result.output.startswith("Error: Cannot write ")
        assert list(tmp_path.rglob("*.part")) == []

    def test_options_that_do_not_go_together(
        self, bundle: Path, keys: KeyPair, tmp_path: Path
    ) -> None:
        out = tmp_path / "cxr.mar"
        for arguments in (
            (bundle, "--out", out, "--verify-key", keys.public),
            ("--check", bundle, "--sign", keys.private),
        ):
            result = run("archive", *arguments)
            assert result.exit_code == 2
            assert "--sign goes with --out, --verify-key with --check." in result.output
        assert not out.exists()

    @pytest.mark.parametrize("policy", ["warn", "enforce"])
    def test_a_policy_needs_a_key(self, tmp_path: Path, policy: str) -> None:
        result = run("serve", tmp_path, "--signature-policy", policy)
        assert result.exit_code == 2
        assert f"--signature-policy {policy} needs --verify-key PUB.pem." in result.output

    def test_an_unknown_policy(self, tmp_path: Path) -> None:
        assert run("serve", tmp_path, "--signature-policy", "maybe").exit_code == 2
