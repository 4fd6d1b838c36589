import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny import make_tiny_model

torch.set_num_threads(1)
# A script's background job ignores SIGINT, and so would all that tests start: Prefect's worker would never end.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Diffusers folder with tiny random networks; read it only."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_i2v_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for image-to-video."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-i2v") / "model", image_to_video=True)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URL of a bucket on an S3 server of this process's own; keep to a prefix of your own."""
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()
