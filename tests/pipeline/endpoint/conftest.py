from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from local_gateway import Gateway, LocalEngines, running_gateway

from pipeline.endpoint.options import EndpointOptions
from pipeline.engine_worker import EngineWorker
from pipeline.job import EngineOptions, Model


@pytest.fixture(scope="session")
def model(tiny_checkpoint: Path) -> Model:
    return Model(str(tiny_checkpoint), dtype="float32")


@pytest.fixture(scope="session")
def options(model: Model) -> EndpointOptions:
    return EndpointOptions(model)


@pytest.fixture(scope="session")
def worker(model: Model) -> Iterator[EngineWorker]:
    worker = EngineWorker(model, EngineOptions(threads=1))
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def engines(worker: EngineWorker) -> LocalEngines:
    return LocalEngines(worker)


@pytest.fixture(scope="session")
def gateway(options: EndpointOptions, engines: LocalEngines) -> Iterator[Gateway]:
    """The gateway that most tests ask: no keys, all limits at their defaults."""
    with running_gateway(options, engines) as gateway:
        yield gateway


@pytest.fixture
def http(gateway: Gateway) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=gateway.url, timeout=60) as client:
        yield client
