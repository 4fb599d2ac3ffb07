"""Being here puts this folder on the path, for ``from shared import shared``; ``tests/data`` for ``hub_server``."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "data"))

import torch

# The models of the tests are tiny: a second thread only waits for the first, and both for whatever else runs.
torch.set_num_threads(1)
