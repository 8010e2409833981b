"""Archives that are whole, but of a model or with a handler that misbehaves."""

import json
from collections.abc import Callable
from pathlib import Path

from cxr.config import ModelConfig
from cxr.engine import CONFIG_FILE
from cxr.mar import CHECKSUMS, digests
from cxr_archive import packager
from support.bundles import make_bundle

Files = dict[str, bytes]
Edit = Callable[[Files], None]


def edited_archive(folder: Path, edit: Edit) -> Path:
    """The small model's archive with some of its files changed, and right checksums."""
    bundle = make_bundle(folder / "bundle")
    files = packager._files(bundle, ModelConfig.from_json((bundle / CONFIG_FILE).read_bytes()))
    edit(files)
    files[CHECKSUMS] = json.dumps(digests(files)).encode()
    path = folder / "edited.mar"
    packager._write_zip(path, files.items())
    return path


def before_each_batch(files: Files, code: str) -> None:
    """Let the handler run some code on `bodies`, the images of a batch, before it answers."""
    call, method = "self.engine.predict(", "\n    def _after_code(self, bodies, options):\n"
    method += "".join(f"        {line}\n" for line in code.splitlines())
    method += f"        return {call}bodies, options)\n"
    handler = files[packager.HANDLER].decode()
    assert handler.count(call) == 2
    handler = handler.replace(call, "self._after_code(")
    assert handler.count("\n    def handle(") == 1
    handler = handler.replace("\n    def handle(", f"{method}\n    def handle(")
    files[packager.HANDLER] = handler.encode()
