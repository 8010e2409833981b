"""The answers that are right: the archive's own, or the service's to one client."""

import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cxr.answer import Prediction
from cxr.engine import Engine
from cxr.errors import ModelLoadError
from cxr.mar import verify
from cxr_loadtests.clients import RestClient
from cxr_loadtests.errors import LoadTestError
from cxr_loadtests.images import Sample
from cxr_loadtests.scenarios import Expectations, Expected, read_answer, requests_of
from cxr_loadtests.target import Target


class Reference(NamedTuple):
    """What the service should say.

    Attributes:
        expectations: by model version.
        explains: whether the model has explanations.
        source: where this comes from, in words.
    """

    expectations: Expectations
    explains: bool
    source: str


def from_archives(archives: Sequence[Path], samples: Sequence[Sample]) -> Reference:
    """Ask the models of archives in this process.

    Raises:
        LoadTestError: an archive cannot be used, or its model refuses one of the images.
    """
    expectations = {}
    explains = True
    for archive in archives:
        with tempfile.TemporaryDirectory() as folder:
            try:
                config = verify(archive)
                with zipfile.ZipFile(archive) as mar:
                    mar.extractall(folder)
                engine = Engine(Path(folder))
            except ModelLoadError as error:
                raise LoadTestError(str(error)) from error
            answers = [engine.predict([sample.data])[0] for sample in samples]
        expected = []
        for answer in answers:
            if not isinstance(answer, Prediction):
                raise LoadTestError(f"The model refuses an image that is to be sent: {answer}")
            expected.append(Expected(answer.label, dict(answer.probabilities)))
        expectations[engine.version] = expected
        explains = explains and config.explanation is not None
    names = ", ".join(archive.name for archive in archives)
    return Reference(expectations, explains, f"{names}, asked in process")


def from_service(target: Target, timeout: float, samples: Sequence[Sample]) -> Reference:
    """Ask the service once for each image, one after the other, before there is any load.

    Raises:
        LoadTestError: it does not answer.
    """
    client = RestClient(target, timeout)
    expected: dict[int, Expected] = {}
    versions = set()
    for scenario in ("rest-raw", "dicom"):
        for request in requests_of(scenario, samples, target.model, grpc=False):
            reply = client.send(request.sendable)
            if reply.code != "200":
                said = reply.problem or f"it answered {reply.code}"
                raise LoadTestError(
                    f"The service does not answer an image before the load: {said}."
                )
            version, answer = read_answer(request, reply)
            versions.add(version)
            expected[request.sample or 0] = answer
    if len(versions) != 1:
        raise LoadTestError(
            "The service answers with several versions; name their archives with --archive."
        )
    asked = requests_of("explain", samples, target.model, grpc=False)[:1]
    explains = any(client.send(request.sendable).code == "200" for request in asked)
    client.close()
    answers = [expected[place] for place in range(len(samples))]
    return Reference({versions.pop(): answers}, explains, "the service itself, asked by one client")
