"""Profiles, images, requests and their turns."""

import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tritonclient.grpc import service_pb2

from cxr.dicom import is_dicom
from cxr_loadtests.clients import Reply, RestClient, Sendable
from cxr_loadtests.errors import LoadTestError
from cxr_loadtests.images import Sample, make_samples
from cxr_loadtests.mix import Mix, pause
from cxr_loadtests.plan import Plan, choose_scenarios
from cxr_loadtests.profile import Profile, ThinkTime, read_profile, scaled
from cxr_loadtests.recorder import CUT_OFF, Key, Recorder
from cxr_loadtests.reference import Reference
from cxr_loadtests.results import pooled
from cxr_loadtests.scenarios import Expected, Outcome, check, requests_of
from cxr_loadtests.store import split_uri
from cxr_loadtests.target import Target
from support.bundles import encoded_image
from support.loadtests import PROFILE, START, record

SAMPLES = [Sample(0, "jpeg", encoded_image(90, kind="JPEG")), Sample(1, "dicom", b"DICM")]
EXPECTATIONS = {"1.0": [Expected("b", {"a": 0.25, "b": 0.75})] * 2}


def test_the_default_profile_has_every_scenario_and_shape() -> None:
    profile = read_profile(None)
    assert len(profile.scenarios) == 8
    assert set(profile.shapes) >= {"smoke", "baseline", "step", "spike", "soak", "arrival", "ship"}
    seconds = sum(phase.seconds for phase in profile.shapes["ship"].phases)
    assert seconds < 120
    with pytest.raises(LoadTestError, match="it has smoke, baseline"):
        profile.shape("nothing")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": []}, "at least 1 item"),
        ({"scenarios": {"telepathy": 1}}, "scenarios.telepathy"),
        ({"images": [{"format": "jpeg", "height": 100}]}, "dicom needs images"),
        ({"timeout_seconds": 0}, "greater than 0"),
        (
            {"shapes": {"x": {"description": "", "phases": [{"name": "p", "seconds": 1}]}}},
            "one of users, rate and knee_share",
        ),
        (
            {
                "shapes": {
                    "x": {
                        "description": "",
                        "phases": [{"name": "p", "seconds": 1, "knee_share": 0.5}],
                    }
                }
            },
            "needs steps before it",
        ),
    ],
)
def test_a_bad_profile_is_one_sentence(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(PROFILE | changes), encoding="utf-8")
    with pytest.raises(LoadTestError) as error:
        read_profile(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(LoadTestError, match=r"Cannot read p\.yaml"):
        read_profile(path)


def test_a_shape_can_be_scaled() -> None:
    profile = read_profile(None)
    spike = scaled(profile.shape("spike"), users=8)
    assert [phase.users for phase in spike.phases] == [8, 8, 80, 8, 8]
    soak = scaled(profile.shape("soak"), rate=12.0, seconds=60)
    assert [(phase.rate, phase.seconds) for phase in soak.phases if phase.judged] == [(12.0, 60)]
    assert not any(phase.step for phase in soak.phases)
    for wrong in ({"users": 3}, {"seconds": 5}):
        shape = {"users": "arrival", "seconds": "step"}[next(iter(wrong))]
        with pytest.raises(LoadTestError, match="leave --"):
            scaled(profile.shape(shape), **wrong)  # type: ignore[arg-type]


def test_images_have_the_profile_s_sizes_and_formats(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded_image(90, (200, 100)))
    profile = Profile.model_validate(PROFILE)
    samples = make_samples(profile.images, tmp_path, seed=1)
    assert [(sample.kind, sample.format) for sample in samples] == [
        (0, "jpeg"), (0, "jpeg"), (1, "dicom"),
    ]  # fmt: skip
    with Image.open(BytesIO(samples[0].data)) as image:
        assert image.size == (400, 200)
    assert samples[0].data != samples[1].data
    assert is_dicom(samples[2].data)
    assert [s.data for s in make_samples(profile.images, tmp_path, seed=1)][:2] == [
        sample.data for sample in samples[:2]
    ]


def test_a_folder_without_images_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match="no PNG, JPEG or TIFF"):
        make_samples(Profile.model_validate(PROFILE).images, tmp_path, seed=1)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(LoadTestError, match=r"Cannot read a\.png"):
        make_samples(Profile.model_validate(PROFILE).images, tmp_path, seed=1)


def test_turns_follow_the_weights_even_in_a_short_run() -> None:
    profile = read_profile(None)
    samples = make_fake_samples(profile)
    requests = [
        request
        for scenario in profile.scenarios
        for request in requests_of(scenario, samples, "cxr", grpc=True)
    ]
    mix = Mix(requests, profile.scenarios, profile.images)
    counts = Counter(mix.next().scenario for _ in range(15 * 4))
    assert counts == {name: 4 * weight for name, weight in profile.scenarios.items()}
    kinds = Counter(mix.next().kind for _ in range(15 * 70))
    assert kinds[0] > kinds[1] > kinds[2] > 0


def make_fake_samples(profile: Profile) -> list[Sample]:
    data = encoded_image(90, kind="JPEG")
    return [Sample(place, kind.format, data) for place, kind in enumerate(profile.images)]


def test_pauses_are_spread_about_their_median_and_cut() -> None:
    source = random.Random(0)  # noqa: S311
    think = ThinkTime(median_seconds=1, sigma=0.5, longest_seconds=3)
    drawn = [pause(think, source) for _ in range(500)]
    assert sorted(drawn)[250] == pytest.approx(1, rel=0.15)
    assert max(drawn) <= 3
    assert pause(ThinkTime(median_seconds=0), source) == 0


def reply_of(scenario: str, label: str, probabilities: list[float]) -> Reply:
    """An answer as the server gives it."""
    headers = {"x-request-id": "1"}
    names = ["a", "b"]
    if scenario == "grpc":
        message = service_pb2.ModelInferResponse(model_name="cxr", model_version="1.0")
        output = message.outputs.add(name="probabilities", datatype="FP32", shape=[1, 2])
        output.contents.fp32_contents.extend(probabilities)
        output.parameters["labels"].string_param = json.dumps(names)
        message.outputs.add(name="label").contents.bytes_contents.append(label.encode())
        return Reply("OK", message.SerializeToString(), headers)
    labels = {"labels": json.dumps(names)}
    if scenario == "v2-binary":
        text = struct.pack("<I", len(label)) + label.encode()
        document = {
            "model_version": "1.0",
            "outputs": [
                {"name": "probabilities", "parameters": labels | {"binary_data_size": 8}},
                {"name": "label", "parameters": {"binary_data_size": len(text)}},
            ],
        }
        header = json.dumps(document).encode()
        body = header + struct.pack("<2f", *probabilities) + text
        length = {"inference-header-content-length": str(len(header))}
        return Reply("200", body, headers | length)
    if scenario == "v2-json":
        document = {
            "model_version": "1.0",
            "outputs": [
                {"name": "probabilities", "data": probabilities, "parameters": labels},
                {"name": "label", "data": [label]},
            ],
        }
    else:
        document = {
            "model_version": "1.0",
            "predictions": [
                {"label": label, "probabilities": dict(zip(names, probabilities, strict=True))}
            ],
            "explanations": [{"class": label, "heatmap": [[0.5, -1.0]], "overlay": {"b64": "x"}}],
        }
    return Reply("200", json.dumps(document).encode(), headers)


@pytest.mark.parametrize(
    "scenario", ["rest-v1", "rest-raw", "v2-json", "v2-binary", "grpc", "explain", "dicom"]
)
def test_each_answer_is_checked_to_its_probabilities(scenario: Any) -> None:
    request = requests_of(scenario, SAMPLES, "cxr", grpc=True)[0]

    def outcome(reply: Reply) -> str:
        return check(request, reply, EXPECTATIONS, 1e-4).failure

    assert outcome(reply_of(scenario, "b", [0.25, 0.75])) == ""
    assert outcome(reply_of(scenario, "b", [0.2503, 0.7497])) == "wrong answer"
    assert outcome(reply_of(scenario, "a", [0.25, 0.75])) == "wrong answer"
    assert outcome(Reply("200", b"{}", {})) == "wrong answer"
    assert outcome(Reply("503", b"", {})) == "503"
    assert outcome(Reply("", b"", {}, "timeout")) == "timeout"


def test_an_answer_of_an_unknown_version_is_wrong() -> None:
    request = requests_of("rest-v1", SAMPLES, "cxr", grpc=True)[0]
    reply = reply_of("rest-v1", "b", [0.25, 0.75])
    assert check(request, reply, {"2.0": EXPECTATIONS["1.0"]}, 1e-4).failure == "wrong answer"


def test_bad_input_must_be_refused_with_its_own_code() -> None:
    requests = requests_of("bad-input", SAMPLES, "cxr", grpc=True)
    assert {request.protocol for request in requests} == {"v1", "v2", "grpc"}
    for request in requests:
        right = Reply(request.refusal, b"", {"x-request-id": "1"})
        assert check(request, right, EXPECTATIONS, 1e-4).failure == ""
        assert check(request, right._replace(code="500"), EXPECTATIONS, 1e-4).failure
        assert check(request, right._replace(code="200"), EXPECTATIONS, 1e-4).failure


def test_recorders_of_several_processes_add_up() -> None:
    request = requests_of("rest-raw", SAMPLES, "m", grpc=False)[0]
    total, worker = Recorder(), Recorder()
    before: list[Key] = []
    for _ in range(3):
        # One of three is still under way at each report, and ends before the next.
        for key in before:
            worker.finish(key, Outcome("200", "", from_server=True), 0.1)
        first, second, third = (worker.start(request, time.monotonic()) for _ in range(3))
        worker.finish(first, Outcome("200", "", from_server=True), 0.1)
        worker.finish(second, Outcome("503", "503", from_server=False), 0.1)
        before = [third]
        total.merge(json.loads(json.dumps(worker.drain())))
        assert total.under_way.total() == 1
    assert total.cut_off() == 1
    assert total.cut_off() == 0
    assert total.codes == {("v1", "200", True): 5, ("v1", "503", False): 3, ("v1", "", False): 1}
    assert pooled(total.records(), 1.0).failures == {"503": 3, CUT_OFF: 1}
    assert pooled(total.records(), 1.0).answered == pooled(total.records(), 1.0).answers == 5


def test_a_request_counts_where_it_was_due_and_its_answer_where_it_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = record(monkeypatch, [(1.5, 2.0, ""), (1.9, 3.0, "timeout")])
    found = [
        (item.second - START, sum(item.buckets.values()), dict(item.failures), item.answers)
        for item in recorder.records()
    ]
    assert found == [(1, 1, {"timeout": 1}, 0), (3, 0, {}, 1)]


def test_what_was_sent_late_counts_where_it_was_due() -> None:
    recorder = Recorder()
    request = requests_of("rest-raw", SAMPLES, "m", grpc=False)[0]
    second, *_ = recorder.start(request, time.monotonic() - 5)
    assert second - time.time() == pytest.approx(-5.5, abs=0.6)


def test_a_client_gives_up_when_the_timeout_is_over_whatever_it_waits_for() -> None:
    """The server takes its time to read the request, and does not answer."""
    timeout, body = 1.5, bytes(32 * 1024 * 1024)

    def read_late(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            time.sleep(1.0)
            while connection.recv(1024 * 1024):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = threading.Thread(target=read_late, args=(listening,))
        server.start()
        client = RestClient(Target(rest=f"http://127.0.0.1:{listening.getsockname()[1]}"), timeout)
        begun = time.monotonic()
        reply = client.send(Sendable("/", body))
        seconds = time.monotonic() - begun
        client.close()
        server.join()
    assert reply.problem == "timeout"
    assert timeout - 0.1 < seconds < timeout + 0.7


def test_a_plan_survives_the_way_to_a_worker() -> None:
    plan = Plan(
        Target(rest="http://x:1", grpc="x:2", headers={"a": "b"}),
        Profile.model_validate(PROFILE),
        SAMPLES,
        EXPECTATIONS,
        ["rest-v1", "grpc"],
        3,
    )
    assert Plan.from_document(plan.to_document()) == plan
    assert "b" not in json.dumps(plan.target.described())


def test_what_cannot_be_asked_is_left_out_and_said() -> None:
    profile = Profile.model_validate(PROFILE)
    target = Target(rest="http://x:1")
    reference = Reference(EXPECTATIONS, explains=False, source="")
    chosen, said = choose_scenarios(profile, [], target, reference)
    assert set(profile.scenarios) - set(chosen) == {"grpc", "explain"}
    assert len(said) == 2
    with pytest.raises(LoadTestError, match="no explanations"):
        choose_scenarios(profile, ["explain"], target, reference)
    with pytest.raises(LoadTestError, match="no scenario telepathy"):
        choose_scenarios(profile, ["telepathy"], target, reference)


@pytest.mark.parametrize("url", ["ftp://x", "127.0.0.1:80", ""])
def test_a_host_that_is_no_url(url: str) -> None:
    with pytest.raises(LoadTestError, match="must be a URL"):
        Target(rest=url)


def test_results_show_no_password() -> None:
    assert Target(rest="http://me:secret@x:1/a").described()["rest"] == "http://x:1/a"


def test_where_results_go() -> None:
    assert split_uri("s3://bucket/a/b/") == ("bucket", "a/b")
    with pytest.raises(LoadTestError, match="s3://BUCKET/PREFIX"):
        split_uri("/results")
