"""The Python client against a real gateway."""

from pathlib import Path

import pytest

from cxr_client.client import Client, PortalError
from cxr_client.schemas import AnsweredImage, RefusedImage
from integration.portal.test_portal_api import BRIGHT, GOOD
from support.portals import Portal


def test_predict(gateway: Portal, tmp_path: Path) -> None:
    path = tmp_path / "chest.png"
    path.write_bytes(GOOD)
    with Client(gateway.url) as client:
        (model,) = client.models()
        assert model.name == "cxr"
        answer = client.predict(path, b"not an image", BRIGHT, explain=True)
        good, bad, bright = answer.images
        assert isinstance(good, AnsweredImage)
        assert set(good.probabilities) == set(model.labels)
        assert good.heatmap is not None
        assert good.heatmap.label == good.label
        assert isinstance(bad, RefusedImage)
        assert bad.reason == "not_an_image"
        assert isinstance(bright, AnsweredImage)
        assert bright.quality is not None
        assert bright.quality.reasons[0].reason == "not_radiograph"
        again = client.predict(path, idempotency_key="client-1")
        assert client.predict(path, idempotency_key="client-1") == again


def test_jobs(gateway: Portal) -> None:
    with Client(gateway.url) as client:
        job = client.submit(GOOD, BRIGHT, b"not an image")
        assert client.job(job.id).id == job.id
        assert job.wait().finished
        result = job.result()
        assert result.job.answered == 2
        assert [image.outcome for image in result.images] == ["answered", "answered", "refused"]
        assert job.result_csv().startswith("index,outcome,label")
        assert job.id in {known.id for known in client.jobs()}
        assert job.cancel().state == "done", "there is nothing left to cancel"
        job.delete()
        with pytest.raises(PortalError, match="no such job") as failure:
            job.refresh()
        assert failure.value.status == 404


def test_errors(gateway: Portal) -> None:
    with Client(gateway.url) as client, pytest.raises(PortalError, match="not an image") as bad:
        client.predict(b"not an image")
    assert bad.value.status == 400
    assert bad.value.kind == "urn:cxr:problem:image-refused"
    assert bad.value.images[0].reason == "not_an_image"
    assert bad.value.request_id
    with Client("http://127.0.0.1:9") as away, pytest.raises(PortalError, match="reached"):
        away.models()
