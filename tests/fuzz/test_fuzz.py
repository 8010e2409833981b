"""The long form of tests/integration/test_server_fuzz.py: `make fuzz`."""

import os
from pathlib import Path

import pytest

from cxr_archive.packager import pack
from cxr_server.settings import RuntimeName
from support.bundles import make_bundle
from support.figures import report
from support.fuzz import Fuzz
from support.servers import serving

REQUESTS = int(os.environ.get("REQUESTS", "10000"))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("runtime", RuntimeName)
def test_many_mixed_requests(tmp_path: Path, runtime: RuntimeName) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    archive = tmp_path / "cxr.mar"
    pack(bundle, archive)
    with serving(archive, f"--runtime={runtime}") as server:
        workers = server.worker_pids()
        fuzz = Fuzz(server, bundle, REQUESTS).run()
        report(f"fuzz, {runtime}", str(fuzz))
        fuzz.check()
        assert server.worker_pids() == workers, "a worker died"
        assert "unexpected" not in server.log
        assert abs(fuzz.growth) < 0.1, fuzz
