"""What mechanisms spend: against the library's reference values, closed forms, and its other accountants."""

from __future__ import annotations

import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from cutlayer import accounting
from cutlayer.accounting import gaussian_epsilon, gaussian_scale, laplace_epsilon
from cutlayer.errors import MethodError


def test_reference_values() -> None:
    assert gaussian_scale(2, 1e-5) == pytest.approx(1.99381, abs=1e-5)
    assert gaussian_epsilon(4, 10, 1e-5) == pytest.approx(3.3414, abs=1e-4)
    assert laplace_epsilon(2, 10, 1e-5) == pytest.approx(4.9900, abs=1e-4)
    rdp = RdpAccountant().compose(dp_accounting.GaussianDpEvent(4), 10).get_epsilon(1e-5)
    assert rdp == pytest.approx(3.6171, abs=1e-4)
    assert rdp > gaussian_epsilon(4, 10, 1e-5)


@pytest.mark.parametrize("releases", [1, 3, 50])
def test_the_closed_form_is_what_composition_gives(releases: int) -> None:
    composed = PLDAccountant().compose(dp_accounting.GaussianDpEvent(6.0), releases).get_epsilon(1e-5)
    assert gaussian_epsilon(6.0, releases, 1e-5) == pytest.approx(composed, rel=2e-3)


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
def test_one_release(epsilon: float) -> None:
    assert gaussian_epsilon(gaussian_scale(epsilon, 1e-5), 1, 1e-5) == pytest.approx(epsilon, abs=1e-6)
    assert laplace_epsilon(1 / epsilon, 1, 1e-9) == pytest.approx(epsilon, abs=1e-12)
    assert gaussian_epsilon(1.0, 0, 1e-5) == laplace_epsilon(1.0, 0, 1e-5) == 0.0
    more = [gaussian_epsilon(gaussian_scale(epsilon, 1e-5), k, 1e-5) for k in (1, 2, 10)]
    assert epsilon <= more[0] * (1 + 1e-6) < more[1] < more[2] < 10 * epsilon


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(MethodError, match=r"pip install 'cutlayer\[privacy\]'"):
        gaussian_scale(1, 1e-5)
    monkeypatch.setattr(accounting, "find_spec", lambda _: None)
    assert list(accounting.unavailable()) == [accounting.MISSING]
    assert not math.isnan(laplace_epsilon(2.0, 1, 1e-9))
