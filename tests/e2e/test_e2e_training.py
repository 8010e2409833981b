"""Training in several pods, as the sample for it shows."""

import json
import time
from pathlib import Path

import pytest

from support.cluster import Namespace, setting
from support.figures import report

SAMPLE = Path(__file__).parents[2] / "k8s" / "samples" / "training-job.yaml"


@pytest.mark.timeout(600)
def test_two_pods_train_one_model(cluster: Namespace) -> None:
    image = setting("CXR_E2E_TRAINING_IMAGE", "training image in the cluster")
    manifest = SAMPLE.read_text(encoding="utf-8").replace("cxr-training:0.1.0", image)
    start = time.monotonic()
    cluster.kubectl("apply", "-f", "-", stdin=manifest)
    try:
        cluster.kubectl("wait", "--for=condition=Complete", "job/cxr-training", "--timeout=280s")
        seconds = time.monotonic() - start
        logs = {
            pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]: (
                cluster.kubectl("logs", pod["metadata"]["name"], "-c", "train")
            )
            for pod in cluster.get("pods", "-l", "job-name=cxr-training")["items"]
        }
    finally:
        cluster.kubectl("delete", "-f", "-", stdin=manifest)
    # Only the first process speaks for the model.
    answer = json.loads(logs["0"][logs["0"].index("{") :])
    assert answer["synthetic"] is True
    assert answer["metrics"]["images"] > 0
    assert "{" not in logs["1"]
    report("training", f"two pods trained one model in {seconds:.0f} s")
