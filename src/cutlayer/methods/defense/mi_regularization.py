"""A variational information bottleneck at the cut: a noisy code in place of the hidden states (survey, 5.2.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cutlayer.contracts import Defense
from cutlayer.defense import Ground, Learned, Privacy, Sends, Shown
from cutlayer.methods.defense._rows import public_states
from cutlayer.registry import method
from cutlayer.threat import Target

if TYPE_CHECKING:
    from cutlayer.config import RunConfig

QUIET = -3.4  # the first bias of the deviation: softplus(-3.9) = 0.02


class Bottleneck(nn.Module):
    """Hidden states to means and deviations of a code, and the code back; at first nearly the identity.

    Args:
        width: H.
        scale: of the code's width, in parts of H.
        size: the hidden states' root mean square, by which the code is of order 1, as the normal that it is held to.
    """

    def __init__(self, width: int, scale: float, size: float) -> None:
        super().__init__()
        code = max(1, round(scale * width))
        self.encode = nn.Linear(width, 2 * code)
        self.decode = nn.Linear(code, width)
        with torch.no_grad():
            into, back = nn.init.orthogonal_(torch.empty(code, width)), torch.zeros(width, code)
            if code >= width:
                into[:] = 0
                into[:width] = torch.eye(width)
            back[:] = into.T
            self.encode.weight[:code] = into / size
            self.encode.weight[code:] = 0
            self.encode.bias.zero_()
            self.encode.bias[code:] = QUIET
            self.decode.weight.copy_(back * size)
            self.decode.bias.zero_()

    def code(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the code [B,T,C] of hidden states [B,T,H]."""
        mean, raw = self.encode(hidden.float()).chunk(2, dim=-1)
        return mean, nn.functional.softplus(raw - 0.5)


def divergence(mean: Tensor, deviation: Tensor) -> Tensor:
    """KL of N(mean, deviation^2) from N(0, 1), each number of them."""
    return 0.5 * (mean.square() + deviation.square() - 1 - 2 * deviation.log())


@method("defense", paper="Zou et al., arXiv:2301.01142", needs=["gradients that come back to the client"])
@dataclass
class MiRegularization(Defense):
    """Show a noisy code of the hidden states, and train it to tell as little as the task allows (MID).

    The paper's term bounds the mutual information of input and code from above by the KL of the code from a standard
    normal; here it is the mean over positions and numbers of the code. No ReLU stands in the bottleneck, as it would
    cut half of a residual stream. Ours: it begins as nearly the identity with a noise of 0.02, so that training starts
    from the model's own loss, and the code is in units of the RMS of random tokens' states behind the public head. The
    noise stays on in evaluation: without it the bound means nothing. The adapter is trained with the bottleneck in its
    place, which is not in it: it stays in the client's checkpoints.
    """

    protects: ClassVar[tuple[Target, ...]] = ("inputs", "labels")
    learning: ClassVar[bool] = True
    strength: Annotated[float, Field(ge=0)] = 1e-2  # lambda: the KL's weight beside the task's loss
    position: Literal["head", "tail"] = "head"  # at step 3, for the inputs; or before the tail, for the labels
    scale: Annotated[float, Field(gt=0)] = 1.0  # the code's width, in parts of the hidden size
    lr: Annotated[float, Field(ge=0)] = 1e-3  # AdamW's, of the bottleneck
    ramp: Annotated[int, Field(ge=0)] = 0  # optimizer steps over which lambda grows to its size

    _module: Bottleneck | None = field(init=False, default=None, repr=False, compare=False)

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Before the tail it needs one."""
        if self.position == "tail" and config.partition.name == "two-part-split":
            yield "with position: tail needs the tail at the client. Take a u-shaped-split"

    def learns(self, ground: Ground) -> Learned:
        """The bottleneck."""
        states = torch.cat([part.flatten(0, 1) for part in public_states(ground)])
        size = float(states.square().mean().sqrt())
        self._module = Bottleneck(states.shape[1], self.scale, size).to(states.device)
        return Learned(self._module, self.lr)

    @property
    def _leg(self) -> str:
        return "send_activations" if self.position == "head" else "send_gradients"

    def _through(self, hidden: Tensor, about: Shown) -> Tensor:
        assert self._module is not None
        mean, deviation = self._module.code(hidden)
        noise = about.noise(covers=[hidden.detach()]).normal(mean.detach())
        found: Tensor = self._module.decode(mean + deviation * noise).to(hidden)
        return found.masked_fill(~about.real.to(hidden.device)[..., None], 0.0)

    def protect(self, shown: Tensor, about: Shown) -> Tensor:
        """At step 3: the hidden states [B,T,H] through the code and its noise."""
        return self._through(shown, about) if about.leg == self._leg == "send_activations" else shown

    def received(self, hidden: Tensor, about: Shown) -> Tensor:
        """At step 6, before the tail."""
        return self._through(hidden, about) if self.position == "tail" else hidden

    def penalty(self, hidden: Tensor, about: Shown) -> Tensor | None:
        """Lambda times the mean KL, in nats a number of the code."""
        grown = min(1.0, (about.updates + 1) / self.ramp) if self.ramp else 1.0
        if about.leg != self._leg or not self.strength:
            return None
        return self.strength * grown * self.divergence(hidden, about.real)

    def divergence(self, hidden: Tensor, real: Tensor) -> Tensor:
        """The mean KL of the code of hidden states [B,T,H] over its numbers, at real positions [B,T]; nats."""
        assert self._module is not None
        with torch.enable_grad():
            return divergence(*self._module.code(hidden[real.to(hidden.device)])).mean()

    def spent(self, ground: Ground, sends: Sends) -> Privacy:
        """Empirical."""
        return Privacy(
            "a noisy code whose information on its input is penalised", "empirical",
            "inputs" if self.position == "head" else "labels", "none", sends.most,
            why="the bound is on an average, and of the training texts", not_covered="the other leg of the step.",
        )  # fmt: skip
