"""What privacy mechanisms spend, by the library ``dp-accounting``.

Neighbours differ in one record that is replaced by any other; a record that was cut to norm C is then at most 2C from
its neighbour, and that is the sensitivity that all functions here expect. No subsampling is taken into account: who
reads the messages knows whose they are. Only this file imports the library.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from cutlayer.errors import MethodError

MISSING = "needs dp-accounting to count what it spends: pip install 'cutlayer[privacy]'"


def unavailable() -> Iterator[str]:
    """A sentence, if the library is not installed."""
    if find_spec("dp_accounting") is None:
        yield MISSING


def gaussian_scale(epsilon: float, delta: float) -> float:
    """The standard deviation, in parts of the sensitivity, of one Gaussian release (analytic calibration)."""
    return float(_library().get_sigma_gaussian(epsilon, delta))


def gaussian_epsilon(scale: float, releases: int, delta: float) -> float:
    """The epsilon of releases with Gaussian noise of this standard deviation, in parts of the sensitivity.

    Exact: so many Gaussians are together one whose scale is divided by the root of their number.
    """
    if not releases:
        return 0.0
    return float(_library().get_epsilon_gaussian(scale / releases**0.5, delta))


def laplace_epsilon(scale: float, releases: int, delta: float) -> float:
    """The epsilon of releases with Laplace noise of this scale, in parts of the (L1) sensitivity.

    One is exactly 1 / scale, with delta 0; several are composed by privacy loss distributions.
    """
    if releases <= 1:
        return releases / scale
    library = _library()
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    accountant.compose(library.LaplaceDpEvent(scale), releases)
    return float(accountant.get_epsilon(delta))


def _library() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise MethodError(f"A defense {MISSING}.") from error
    return dp_accounting
