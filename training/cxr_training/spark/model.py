"""The model to score with: read and checked on the driver, loaded once in each Python worker."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from cxr.config import ModelConfig, load_config
from cxr.engine import CONFIG_FILE, Engine
from cxr.errors import ModelLoadError
from cxr.mar import find_archive, verify


@dataclass(frozen=True)
class Model:
    """A model as it travels to the executors.

    Attributes:
        config: the configuration.
        graph: the bytes of the ONNX graph that it names.
    """

    config: ModelConfig
    graph: bytes


def read_model(path: Path) -> Model:
    """Read a model, and let it answer a blank image.

    Args:
        path: a bundle folder, a `.mar` file, or a folder with one `.mar` file.

    Raises:
        ModelLoadError: none of these, damaged, or its parts do not fit together.
    """
    if (path / CONFIG_FILE).is_file():
        config = load_config(path)
        file = path / config.graph.file
        try:
            graph = file.read_bytes()
        except OSError as error:
            raise ModelLoadError(f"Cannot read {file}: {error.strerror}.") from error
    else:
        archive = find_archive(path)
        config = verify(archive)
        with zipfile.ZipFile(archive) as mar:
            graph = mar.read(config.graph.file)
    model = Model(config, graph)
    load(model).warm_up()
    return model


def load(model: Model, threads: int = 1) -> Engine:
    """Load the model; the engine checks that the graph is the configuration's.

    Args:
        model: what :func:`read_model` returned.
        threads: threads that one forward pass may use.
    """
    with TemporaryDirectory(prefix="cxr-model-") as folder:
        bundle = Path(folder)
        (bundle / CONFIG_FILE).write_text(model.config.to_json(), encoding="utf-8")
        (bundle / model.config.graph.file).write_bytes(model.graph)
        return Engine(bundle, threads=threads)
