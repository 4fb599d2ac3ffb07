"""A client's answers, each held to its guard, and given once: a request that is sent again gets the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from cutlayer.errors import PolicyRefused
from cutlayer.guard import Guard
from cutlayer.parties.client import ClientParty
from cutlayer.wire import Header

Answer = tuple[Header, list[Tensor]]
Opened = Callable[[Header, list[Tensor]], Answer]
Seal = Callable[[Header, Header, Sequence[Tensor]], Answer]
KEPT_ANSWERS = 4  # that can be given again


def guarded(
    answer: Callable[..., Answer], guard: Guard, opened: Opened | None = None, seal: Seal | None = None
) -> Callable[[ClientParty, Header, Sequence[Tensor]], Answer]:  # fmt: skip
    """``parties.client.answer``, held to a policy; a request that is sent again gets the same answer.

    ``opened`` makes of a request what it is without a seal; ``seal`` of one, and the answer that may leave, what does.
    """
    kept: dict[int, tuple[Header, Answer, Answer]] = {}  # by turn: the request, what was judged of it, and what left

    def answered(party: ClientParty, header: Header, tensors: Sequence[Tensor]) -> Answer:
        if guard.known(header):
            if header.turn not in kept:
                raise PolicyRefused("order", f"turn {header.turn} was answered, and its answer is no longer kept.")
            asked, judged, left = kept[header.turn]
            guard.again(asked, *judged)
            return left
        if opened is not None:
            header, tensors = opened(header, list(tensors))
        guard.request(header, tensors)
        reply, shown = answer(party, header, tensors)
        guard.reply(header, reply, shown)
        left = (reply, list(shown)) if seal is None else seal(header, reply, shown)
        for turn in [
            turn for turn, (_, old, _) in kept.items() if old[0].kind == "state" or turn <= header.turn - KEPT_ANSWERS
        ]:
            del kept[turn]  # a state is the slot's own tensors, which the next request may change
        judged = (reply, [tensor.detach() for tensor in shown])
        kept[header.turn] = header, judged, (judged if seal is None else left)
        return left

    return answered
