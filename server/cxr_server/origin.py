"""Whether an archive comes from who it should, before anything else reads it."""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cxr.errors import ModelLoadError
from cxr_server.settings import Settings, SignaturePolicy

log = logging.getLogger(__name__)


@contextlib.contextmanager
def checked_origin(archive: Path, settings: Settings) -> Iterator[Path]:
    """Check an archive's signature as the policy says.

    Args:
        archive: the `.mar`; its signature is the file beside it, with `.sig` after its name.
        settings: the policy, and the key.

    Yields:
        The archive to load: itself where the policy is off, otherwise a private copy that was
        checked, so that nobody can change it between the check and the loading.

    Raises:
        ModelLoadError: the key cannot be used, or the policy refuses the archive.
    """
    if settings.signature_policy is SignaturePolicy.OFF:
        yield archive
        return
    with tempfile.TemporaryDirectory(prefix="cxr-archive-") as folder:
        copy = Path(folder) / archive.name
        try:
            shutil.copyfile(archive, copy)
        except OSError as error:
            raise ModelLoadError(
                f"Cannot copy {archive.name} to check it: {error.strerror}."
            ) from error
        _check(copy, archive, settings)
        yield copy


def _check(copy: Path, archive: Path, settings: Settings) -> None:
    # Where the policy is off, neither the module nor its libraries are loaded.
    from cxr import signature  # noqa: PLC0415

    assert settings.verify_key is not None  # noqa: S101 - the command asks for it
    key = signature.load_public_key(settings.verify_key)
    try:
        signature.check(copy, signature.signature_path(archive), key)
    except signature.SignatureError as error:
        if settings.signature_policy is SignaturePolicy.ENFORCE:
            raise
        log.warning("%s", error)
    else:
        log.info("%s is signed by the key of %s", archive.name, settings.verify_key.name)
