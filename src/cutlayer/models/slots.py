"""A slot: trainable Parameters with their optimizer, their gradients in waiting, and nothing else.

Verbs only *add* gradients; ``update`` is its own act. Contributions are kept apart by (client, step, micro-batch) and
summed in sorted order, so the order of arrival does not change a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cutlayer.errors import NonFinite
from cutlayer.models.arena import Arena
from cutlayer.models.importance import Importance

Key = tuple[str, int, int]  # client, step, micro-batch
MakeOptimizer = Callable[[list[Parameter]], torch.optim.Optimizer]
LARGEST = 1e12  # norm of a tensor's gradient, so that sums of squares, as of optimizers, stay finite
PRIVATE = "private/"  # begins the names of what stays at its client, whatever else leaves, and is in no norm
NUMBER = "#number"  # marks optimizer state that is a plain number, carried as a float64 scalar


class Slot:
    """Trainable parameters that one or several clients' steps update.

    Args:
        name: of the slot; stands in frames and checkpoints.
        params: name -> Parameter; two names of a tied weight map to one Parameter. The slot owns them.
        make_optimizer: from the list of parameters (each once) to a PyTorch optimizer.
        rate: learning rate as a multiple of the base rate, by the number of updates made so far.
        arena: where the optimizer's state is kept; None leaves it where PyTorch allocates it.
    """

    def __init__(
        self,
        name: str,
        params: Mapping[str, Parameter],
        make_optimizer: MakeOptimizer,
        rate: Callable[[int], float] = lambda _: 1.0,
        arena: Arena | None = None,
    ) -> None:
        self.name = name
        self.params = dict(params)
        self.version = 0
        self._unique = _unique(self.params)
        first = {id(parameter): name for name, parameter in self._unique.items()}
        self._own = {name: first[id(parameter)] for name, parameter in self.params.items()}
        self._make = make_optimizer
        self._rate = rate
        self._arena = arena
        self._homes: dict[tuple[int, str], Tensor] = {}  # by parameter and key: where its optimizer state stays
        self._pending: dict[Key, dict[str, Tensor]] = {}
        self.penalty: Callable[[], Mapping[str, Tensor]] | None = None  # of a loss on the weights: gradients, by name
        self.importance: Importance | None = None  # sees each step's gradient, where a method wants it
        self.optimizer: torch.optim.Optimizer | None = None
        self.reset_optimizer()
        if arena is not None:
            self._homes = self._foreseen(arena)

    def retime(self, rate: Callable[[int], float]) -> None:
        """Take another learning rate, by the number of updates made so far."""
        self._rate = rate

    def new_optimizer(self, params: list[Parameter]) -> torch.optim.Optimizer:
        """An optimizer of the same kind for other parameters."""
        return self._make(params)

    def reset_optimizer(self) -> None:
        """Forget the optimizer's state."""
        self._at_home = False
        values = list(self._unique.values())
        self.optimizer = self._make(values) if values else None
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups] if self.optimizer else []

    def collect(self, names: Iterable[str], key: Key, *, weight: float = 1.0) -> None:
        """Take the ``.grad`` of ``names`` (left there by a backward) as the contribution of ``key``."""
        self.add(self._left(names), key=key, weight=weight)

    def taken(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The ``.grad`` of ``names``, which are not the slot's yet; of a tied weight under one name."""
        found: dict[str, Tensor] = {}
        for name, grad in self._left(names).items():
            own = self._own[name]
            found[own] = found[own] + grad if own in found else grad
        return found

    def _left(self, names: Iterable[str]) -> dict[str, Tensor]:
        """What a backward left at these parameters, taken away from there."""
        grads: dict[str, Tensor] = {}
        for name in names:
            parameter = self.params[name]
            if parameter.grad is not None:
                grads[name] = parameter.grad
                parameter.grad = None
        return grads

    def add(self, grads: Mapping[str, Tensor], *, key: Key, weight: float = 1.0) -> None:
        """Add ``weight`` times ``grads`` to the contribution of ``key``.

        The two uses of a tied weight are summed here, within the micro-batch, as autograd does it: summed at the update
        they would differ from an unsplit run in the last bit, which AdamW can make 1e-6 in a few steps.

        Raises:
            NonFinite: one is not finite, or so large that its squares would not be; nothing is added.
        """
        most = _largest(grads.values())
        if not most <= LARGEST:
            client, step, _ = key
            raise NonFinite(
                f"The gradient of client '{client}' at step {step} has the norm {most:g}. Nothing was updated with it. "
                "Lower optimizer.lr, set max_grad_norm, or use precision: float32 or bfloat16."
            )
        self._fold(grads, key=key, weight=weight)

    def _fold(self, grads: Mapping[str, Tensor], *, key: Key, weight: float = 1.0) -> None:
        held = self._pending.setdefault(key, {})
        for name, grad in grads.items():
            scaled = grad if weight == 1.0 else grad * weight
            own = self._own[name]
            held[own] = held[own] + scaled if own in held else scaled

    def close(self, key: Key) -> None:
        """Say that ``key`` gets no more, so that its sum can be folded into the micro-batch before it.

        A client's micro-batches are first-in first-out, so folding (client, step, m) into (client, step, m - 1) keeps
        the sorted order of the sum, and accumulation costs one set of gradients rather than one a micro-batch.
        """
        client, step, micro = key
        before = max((k for k in self._pending if k[:2] == (client, step) and k[2] < micro), default=None)
        if before is None or key not in self._pending:
            return
        grads = self._pending.pop(key)
        self._fold(grads, key=before)

    @property
    def waiting(self) -> set[str]:
        """Whose gradients wait."""
        return {client for client, _, _ in self._pending}

    def drop(self, client: str) -> None:
        """Forget what a client that left has contributed since the last update."""
        for key in [k for k in self._pending if k[0] == client]:
            del self._pending[key]

    def _total(self, weights: Mapping[str, float] | None = None, *, by_tensor: bool = False) -> dict[str, Tensor]:
        """The summed gradient, by the unique names; each client's part times its weight, where given.

        With a ``penalty`` its gradient is in it, unweighted.
        """
        total: dict[str, Tensor] = {}
        whole = self._passed(weights) if weights is not None and by_tensor else {}
        for key in sorted(self._pending):
            weight = 1.0 if weights is None else weights[key[0]]
            for name, grad in self._pending[key].items():
                part = weight / whole[name] if name in whole else weight
                scaled = grad if part == 1.0 else grad * part
                total[name] = total[name] + scaled if name in total else scaled
        for name, grad in (self.penalty() if self.penalty is not None else {}).items():
            total[name] = total[name] + grad if name in total else grad
        return total

    def _passed(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The weight of those who have contributed to a tensor, where that is not everybody."""
        passed: dict[str, set[str]] = {}
        for (client, _, _), grads in self._pending.items():
            for name in grads:
                passed.setdefault(name, set()).add(client)
        return {name: sum(weights[c] for c in sorted(by)) for name, by in passed.items() if by != set(weights)}

    def squared_norm(self, weights: Mapping[str, float] | None = None, *, by_tensor: bool = False) -> float:
        """The squared L2 norm of the gradient in waiting, summed in float64."""
        return float(sum(n * n for _, n in self.norms(weights, by_tensor=by_tensor)))

    def norms(
        self, weights: Mapping[str, float] | None = None, *, by_tensor: bool = False
    ) -> list[tuple[Key | None, float]]:
        """The L2 norm of each tensor's gradient in waiting, in the order of their sum.

        Beside it the first contribution with this tensor, which decides that order; None: only the penalty has it.
        """
        first: dict[str, Key] = {}
        for key in sorted(self._pending):
            first |= dict.fromkeys(self._pending[key].keys() - first.keys(), key)
        total = self._total(weights, by_tensor=by_tensor)
        return [
            (first.get(name), torch.linalg.vector_norm(grad).item())
            for name, grad in total.items()
            if not name.startswith(PRIVATE)
        ]

    def update(
        self, *, scale: float = 1.0, weights: Mapping[str, float] | None = None, rate: float = 1.0,
        by_tensor: bool = False,
    ) -> int:  # fmt: skip
        """Make one optimizer step with ``scale`` times the summed contributions, and forget them.

        ``weights``, by client, weigh the contributions of several clients against each other; with ``by_tensor`` those
        who have contributed to a tensor share its whole weight. ``rate`` multiplies the learning rate of this step.

        Returns:
            the slot's version: how many updates it has had.
        """
        total = self._total(weights, by_tensor=by_tensor)
        self._pending.clear()
        if self.importance is not None:
            self.importance.see(total)
        if self.optimizer is not None:
            for name, parameter in self._unique.items():
                grad = total.get(name) if parameter.numel() else None  # of rank 0: nothing to train, and no state
                parameter.grad = grad if grad is None or scale == 1.0 else grad * scale
            for group, base in zip(self.optimizer.param_groups, self._base_rates, strict=True):
                group["lr"] = base * self._rate(self.version) * rate
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self._move_home()
        self.version += 1
        return self.version

    def _foreseen(self, arena: Arena) -> dict[tuple[int, str], Tensor]:
        """Homes for the state that the optimizer will keep, learnt from a step on one number.

        The state is born after the first backward, when it would lie (as would PyTorch's own small records of it)
        between tensors that the next client's step wants to use again. A state of another shape is kept when it comes.
        """
        homes = {}
        for number, parameter in enumerate(self._unique.values()):
            probe = Parameter(torch.zeros((1,) * parameter.dim(), dtype=parameter.dtype, device=parameter.device))
            probe.grad = torch.zeros_like(probe)
            optimizer = self._make([probe])
            optimizer.step()
            for key, value in optimizer.state[probe].items():
                if isinstance(value, Tensor):
                    shape = parameter.shape if value.dim() else ()
                    homes[number, key] = arena.zeros(shape, value.dtype, value.device)
        return homes

    def _move_home(self) -> None:
        """Put optimizer state that is not yet in the arena there."""
        if self._arena is None or self._at_home:
            return
        assert self.optimizer is not None
        for number, parameter in enumerate(self._unique.values()):
            entries = self.optimizer.state[parameter]
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    home = self._homes.get((number, key))
                    if home is None or home.shape != value.shape or home.dtype != value.dtype:
                        home = self._homes[number, key] = self._arena.keep(value)
                    entries[key] = home.copy_(value)
        self._at_home = True

    def reshape(self, state: Mapping[str, Tensor]) -> None:
        """Take parameters of other shapes (ranks); the optimizer's state of these is forgotten.

        The Parameters stay the same objects, with another tensor inside.
        """
        assert self.idle, f"slot {self.name} has gradients in waiting"
        for name, tensor in state.items():
            parameter = self.params[name]
            parameter.data = tensor.detach().to(parameter.device, parameter.dtype, copy=True)
        self.forget(state)

    def forget(self, names: Iterable[str]) -> None:
        """Forget the optimizer's state of some parameters: whoever has them now goes on with it."""
        if self.optimizer is not None:
            for name in names:
                self.optimizer.state.pop(self.params[name], None)
            self._at_home = False

    @property
    def idle(self) -> bool:
        """Whether no gradient waits."""
        return not self._pending

    def get(self, *, optimizer: bool = False) -> dict[str, Tensor]:
        """The parameters by name (each tied weight once), detached; with the optimizer's state under ``optimizer/``."""
        state = {name: parameter.detach() for name, parameter in self._unique.items()}
        if optimizer and self.optimizer is not None:
            names = list(self._unique)
            # Sorted, as the optimizer's own order is another one after a restart, and frames must not show that.
            for index, entries in sorted(self.optimizer.state_dict()["state"].items()):
                for key, value in sorted(entries.items()):
                    if isinstance(value, Tensor):
                        state[f"optimizer/{names[index]}/{key}"] = value.detach()
                    elif value is not None:
                        state[f"optimizer/{names[index]}/{key}{NUMBER}"] = torch.tensor(
                            float(value), dtype=torch.float64
                        )
        return state

    def put(self, state: Mapping[str, Tensor], *, version: int | None = None, resize: bool = False) -> None:
        """Take parameters (and optimizer state, where given) from ``state``; names that are absent stay as they are.

        Values are copied in. There must be no open graph on this slot: a copy under one would change its gradients.
        ``resize`` allows other shapes than it has (a checkpoint's, after ranks have changed).
        """
        assert self.idle, f"slot {self.name} has gradients in waiting"
        given = {name: state[name] for name in self._unique if name in state}
        if resize:
            self.reshape({n: t for n, t in given.items() if t.shape != self.params[n].shape})
        with torch.no_grad():
            for name, tensor in given.items():
                self.params[name].copy_(tensor)
        moments = {k: v for k, v in state.items() if k.startswith("optimizer/")}
        if moments and self.optimizer is not None:
            self._put_optimizer(moments)
        if version is not None:
            self.version = version

    def _put_optimizer(self, moments: Mapping[str, Tensor]) -> None:
        assert self.optimizer is not None
        entries: dict[int, dict[str, Any]] = {}
        index = {name: i for i, name in enumerate(self._unique)}
        for path, value in moments.items():
            name, _, key = path.removeprefix("optimizer/").rpartition("/")
            number = key.endswith(NUMBER)
            key = key.removesuffix(NUMBER)
            entries.setdefault(index[name], {})[key] = value.item() if number else value.clone()
        kept = self.optimizer.state_dict()  # of what is not given, such as the blocks that stay when others move
        entries = {**kept["state"], **entries}
        self.optimizer.load_state_dict({"state": entries, "param_groups": kept["param_groups"]})
        self._at_home = False
        for name, parameter in self._unique.items():
            for key, value in entries.get(index[name], {}).items():
                loaded = self.optimizer.state[parameter][key]
                if isinstance(value, Tensor) and loaded.dtype != value.dtype:
                    # PyTorch casts what it loads to the parameter's type, but NAdam and ASGD keep float32 numbers.
                    self.optimizer.state[parameter][key] = value.to(loaded.device)
        self._move_home()  # at once: with a trunk for each client, merged moments would lie twice until the next step


def _largest(tensors: Iterable[Tensor]) -> float:
    """The largest L2 norm among these; NaN or infinite where a number in them is, or cannot be squared."""
    found = [
        torch.linalg.vector_norm(tensor.detach(), dtype=torch.promote_types(tensor.dtype, torch.float32))
        for tensor in tensors
    ]
    return float(torch.stack([norm.to(found[0].device, torch.float32) for norm in found]).amax()) if found else 0.0


def parameter_of(name: str) -> str:
    """The parameter that a tensor of a slot's state belongs to."""
    return name.removeprefix("optimizer/").rpartition("/")[0] if name.startswith("optimizer/") else name


def new_params(
    initial: Mapping[str, Parameter], names: Iterable[str], arena: Arena | None = None
) -> dict[str, Parameter]:
    """Fresh Parameters with the values of ``initial``; names that share a Parameter there share one here.

    A private name has the value of the other, and a Parameter of its own.
    """
    made: dict[tuple[int, bool], Parameter] = {}
    out = {}
    for name in names:
        source = initial[name.removeprefix(PRIVATE)]
        key = id(source), name.startswith(PRIVATE)
        if key not in made:
            value = source.detach().clone() if arena is None else arena.keep(source)
            made[key] = Parameter(value, requires_grad=True)
        out[name] = made[key]
    return out


def _unique(params: Mapping[str, Parameter]) -> dict[str, Parameter]:
    seen: set[int] = set()
    out = {}
    for name, parameter in params.items():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            out[name] = parameter
    return out
