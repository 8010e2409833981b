"""The model configuration: what it accepts, and how it says no."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cxr.config import ModelConfig, file_sha256, load_config
from cxr.errors import ModelLoadError
from support.bundles import LABELS, config_document, graph_bytes, make_bundle

Document = dict[str, Any]


@pytest.fixture
def document() -> Document:
    # Through JSON, so that a test may change any part of its own copy.
    copy: Document = json.loads(json.dumps(config_document(graph_bytes())))
    return copy


def refusal(document: object) -> str:
    with pytest.raises(ModelLoadError) as caught:
        ModelConfig.from_json(json.dumps(document))
    return str(caught.value)


def test_round_trip(document: Document) -> None:
    config = ModelConfig.from_json(json.dumps(document))
    assert config.labels == LABELS
    assert json.loads(config.to_json()) == document
    assert ModelConfig.from_json(config.to_json()) == config
    assert config.to_json().endswith("}\n")


@pytest.mark.parametrize(
    "path", [(), ("preprocessing",), ("graph",), ("graph", "input"), ("metrics", "accuracy")]
)
def test_an_unknown_field_is_refused_by_name(document: Document, path: tuple[str, ...]) -> None:
    place = document
    for part in path:
        place = place[part]
    place["temperature"] = 1
    message = refusal(document)
    assert ".".join((*path, "temperature")) in message


@pytest.mark.parametrize("field", ["name", "labels", "preprocessing", "graph", "limitations"])
def test_a_missing_field_is_refused_by_name(document: Document, field: str) -> None:
    del document[field]
    assert f": {field}:" in refusal(document)


def _set(*path: str | int, to: object) -> Callable[[Document], None]:
    def change(document: Any) -> None:
        for part in path[:-1]:
            document = document[part]
        document[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set("schema_version", to=2), "schema_version"),
        (_set("name", to="My Model"), "name"),
        (_set("version", to="v1"), "version"),
        (_set("labels", to=["COVID-19"]), "labels"),
        (_set("labels", to=["COVID-19", "No finding", "No finding"]), "labels must be unique"),
        (_set("labels", to=["COVID-19", "No finding", "Lung opacity"]), "thresholds"),
        (_set("thresholds", to={"COVID-19": 0.5}), "thresholds"),
        (_set("thresholds", "COVID-19", to=1.5), "thresholds.COVID-19"),
        (_set("training_data", "labels", to={"COVID-19": 3}), "training_data.labels"),
        (_set("metrics", "per_class", to={}), "metrics.per_class"),
        (_set("preprocessing", "height", to=65), "graph.input.shape"),
        (_set("preprocessing", "layout", to="NHWC"), "graph.input.shape"),
        (_set("preprocessing", "layout", to="NCWH"), "preprocessing.layout"),
        (_set("preprocessing", "std", to=[1, 1, 0]), "std above zero"),
        (_set("graph", "output", "shape", to=[-1, 2]), "graph.output.shape"),
        (_set("graph", "input", "dtype", to="uint8"), "graph.input.dtype"),
        (_set("graph", "sha256", to="00"), "graph.sha256"),
        (_set("graph", "file", to="../model.onnx"), "graph.file"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(
    document: Document, change: Callable[[Document], None], named: str
) -> None:
    change(document)
    message = refusal(document)
    assert message.startswith("The model configuration is not valid: ")
    assert named in message


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[]", b"null"])
def test_not_a_document(text: bytes) -> None:
    with pytest.raises(ModelLoadError, match="not valid: document"):
        ModelConfig.from_json(text)


def test_a_bundle_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"cxr-model\.json: No such file"):
        load_config(tmp_path)


def test_a_bundle_is_read_from_its_folder(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, version="2.1")
    config = load_config(bundle)
    assert config.version == "2.1"
    assert config.graph.sha256 == file_sha256(bundle / config.graph.file)
