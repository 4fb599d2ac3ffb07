"""Being here puts this folder on the path, for ``from shared import shared``; ``tests/data`` for ``hub_server``."""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "data"))

import pytest
import torch

from crash import Forge

# The models of the tests are tiny: a second thread only waits for the first, and both for whatever else runs.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    """The process that has imported everything; it forks for each command that a test runs."""
    made = Forge(tmp_path_factory.mktemp("commands"))
    yield made
    made.close()
