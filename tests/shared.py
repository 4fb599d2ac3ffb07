"""Real data and models beside the repository; a test that needs one is skipped where it is not there."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(path: str) -> Path:
    """A file or folder of ``../shared``, such as ``data/e2e/valid.jsonl.gz``, or skip the test."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{found} is not on this machine")
    return found
