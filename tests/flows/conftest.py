from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One real Prefect server for all flow tests of this process; takes 5-20 s to start."""
    from flows.server import prefect_api

    with prefect_api(tmp_path_factory.mktemp("prefect")) as url:
        yield url
