"""Being here puts this folder on the path, for ``from shared import shared``; ``tests/data`` for ``hub_server``."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "data"))
