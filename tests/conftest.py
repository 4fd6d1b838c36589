from pathlib import Path

import pytest
import torch

from tests.tiny import make_tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Diffusers folder with tiny random networks; read it only."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
