"""Several models side by side, pulled softly to their mean; features of idle clients fill what a model has not seen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from cutlayer.contracts import SERVER, Framework, Layout, Parcel, Stop
from cutlayer.errors import MethodError
from cutlayer.methods.framework._cohort import check_options, cohort, newest, ordered
from cutlayer.methods.framework._replay import Memory, Replay, Rows, blended, dealt_over
from cutlayer.registry import method

if TYPE_CHECKING:
    from cutlayer.driver import Run

MASTER = "master"


@dataclass
class _Kept:
    """What is kept between rounds: the branches' clients' parts, at the federated server, and what replay remembers."""

    memory: Memory
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by branch, with the optimizer's state
    versions: dict[str, int] = field(default_factory=dict)


@method("framework", paper="Xia et al., AAAI 39(1), 2025; preprint (KoReA-SFL) arXiv:2404.12846")
@dataclass(frozen=True)
class MultiSFL(Framework):
    """Branches, each a whole split model, train on different clients and are pulled softly to their mean, the master.

    In a round each branch gets one client: the federated server sends it the branch's part, it trains with the
    branch's trunk and sends the part back. Then the master is the mean of the branches, and each branch moves a
    fraction ``alpha`` towards it. The master is what is evaluated and saved. Kept at the servers: ``branches`` + 1
    trunk adapters and as many of the clients' parts.

    ``replay`` (off: it shows the server features and labels of clients that do not train) fills what a branch has not
    seen: clients tell the counts of their categories (classes, or classes of length where there are none), each branch
    has a discounted mean of those of its clients, and idle clients send features of the categories below its average,
    a fraction p of the client's examples. Only the two-part split can replay: in the U-shape the labels of helpers
    would have to go to other clients. p follows the federated gradient norm, the mean of -lr |g|^2 over branches.

    From public re-implementations and the abstracts: ``alpha``, ``gamma``, p, and features in the first batch
    (``spread: first``). Ours: features spread over the round's batches, without dropout, the norm taken over the trunk,
    which the server has, quotas rounded to their sum, and the classes of length.
    """

    branches: int = 2  # models side by side, and clients in a round
    alpha: float = 0.1  # how far a branch moves to the master after each round
    sampling: Literal["round-robin", "random"] = "round-robin"  # the clients of a round
    local_steps: int = 1  # optimizer steps of a client in a round
    optimizer_state: Literal["travel", "reset"] = "travel"  # whether a branch's moments go along with its part
    replay: bool = False  # clients that do not train send features and labels of categories that a branch lacks
    p0: float = 0.05  # replayed rows to a client's own, at the start
    p_min: float = 0.01  # the least that p falls to
    p_max: float = 0.1  # the most that p rises to
    gamma: float = 0.9  # what a round ago counts in a branch's history
    spread: Literal["even", "first"] = "even"  # over the batches of the round, or all in the first
    max_trials: int = 3  # idle clients that are asked for a branch in a round, at most
    _kept: _Kept = field(init=False, repr=False, compare=False)

    travels: ClassVar[bool] = True
    merges = True

    def __post_init__(self) -> None:
        check_options(self.local_steps, 1.0)
        if self.branches < 1:
            raise ValueError(f"branches is {self.branches}; it must be 1 or more")
        for name in ("alpha", "gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and at most 1")
        if not 0 <= self.p_min <= self.p0 <= self.p_max:
            raise ValueError(f"p_min, p0, p_max are {self.p_min}, {self.p0}, {self.p_max}; none may be below the last")
        if self.max_trials < 1:
            raise ValueError(f"max_trials is {self.max_trials}; it must be 1 or more")
        object.__setattr__(self, "_kept", _Kept(Memory(self.p0)))

    @property
    def optimizer_travels(self) -> bool:
        """With a branch's part, if it is to."""
        return self.optimizer_state == "travel"

    @property
    def asks(self) -> Collection[str]:
        """What replay needs."""
        return ("histogram", "features") if self.replay else ()

    @property
    def participation(self) -> float:
        """Not a share: one client for each branch."""
        return 1.0

    @property
    def cohort_size(self) -> int:
        """One client for each branch."""
        return self.branches

    def layouts(
        self, given: Mapping[str, Layout], num_blocks: int, speeds: Mapping[str, float] | None
    ) -> Mapping[str, Layout]:
        """As the partition has it, where that can be."""
        if self.branches > len(given):
            raise MethodError(
                f"framework 'multisfl': {self.branches} branches need as many clients in a round, but there are "
                f"{len(given)}. Take fewer branches, or more clients."
            )
        if self.replay and any(layout.tail_at_client for layout in given.values()):
            raise MethodError(
                "framework 'multisfl' replays features at the server, which needs their labels. Take partition: "
                "two-part-split, or replay: false."
            )
        return given

    def route(self, client: str, layouts: Mapping[str, Layout]) -> Sequence[Stop]:
        """The master, which is evaluated; a client that trains is led to its branch."""
        return [Stop(SERVER, MASTER, layouts[client].middle)]

    def reach(self, client: str, layouts: Mapping[str, Layout]) -> Sequence[Stop]:
        """Any branch."""
        return [Stop(SERVER, branch, layouts[client].middle) for branch in self.names]

    @property
    def names(self) -> list[str]:
        """Of the branches."""
        return [f"branch-{number}" for number in range(self.branches)]

    def eligible(self, number: int, clients: Sequence[str]) -> Sequence[str]:
        """All; with ``round-robin`` those whose turn it is."""
        if self.sampling == "random":
            return clients
        return [clients[(number * self.branches + i) % len(clients)] for i in range(min(self.branches, len(clients)))]

    async def round(self, run: Run, number: int) -> None:
        """Each branch trains on one client; then the master, and the pull to it."""
        kept = self._kept
        if not kept.parts:
            self._begin(run)
        clients = cohort(run, number, self.participation)
        branches = ordered(run, self.names, "random", "branches", number)
        pairs = dict(zip(clients, branches, strict=False))  # who has which branch; some may go without
        replayed = await self._replayed(run, pairs, number) if self.replay else {}
        norms: list[float] = []
        await run.together(lambda c: self._train(run, c, pairs[c], replayed.get(c, []), norms), list(pairs))
        if self.replay and norms:
            kept.memory.adapt(-sum(norms) / len(norms), self.p_min, self.p_max)
        if pairs:
            self._to_the_master(run, {branch: client for client, branch in pairs.items()})

    def _begin(self, run: Run) -> None:
        """Every branch starts as the model does."""
        own = run.parts.clients[run.clients[0]].names("own")
        start = {name: p.detach().cpu().clone() for name, p in run.parts.base.initial.items() if name in own}
        for branch in self.names:
            self._kept.parts[branch], self._kept.versions[branch] = dict(start), 0

    async def _train(self, run: Run, client: str, branch: str, rows: Sequence[Rows], norms: list[float]) -> None:
        """A client's local steps with a branch's part and trunk; the part goes back. A lost client changes neither."""
        kept, end, master = self._kept, run.ends[client], run.parts.routes[client]
        part = kept.parts[branch]
        state = {name: part[name] for name in sorted(part)}
        await run.reach(lambda _: end.put(state, version=kept.versions[branch], reset=True), [client])
        if run.presence.out(client):
            return
        run.set_route(client, [Stop(SERVER, branch, stop.blocks) for stop in master])
        steps = min(self.local_steps, run.steps_left(client))
        slot = run.parts.slot(run.parts.routes[client][-1])
        before = {name: tensor.clone() for name, tensor in slot.get(optimizer=True).items()}, slot.version
        for mine in dealt_over(rows, steps, self.spread):
            stops: list[Replay] = []

            def wrap(stop: Any, mine: Sequence[Rows] = mine, stops: list[Replay] = stops) -> Any:
                stops.append(Replay(stop, slot, mine))
                return stops[-1]

            if await run.step(client, wrap=wrap if self.replay else None) is None:
                break
            norms += [run.config.optimizer.lr * stop.squared for stop in stops]
        run.set_route(client, master)

        async def take(_: str) -> None:
            parcel = await end.ask("get_state", {"optimizer": self.optimizer_state == "travel", "part": "own"})
            kept.parts[branch], kept.versions[branch] = dict(parcel.tensors), int(parcel.header.value("version"))

        if not run.presence.out(client):
            await run.reach(take, [client])
        if run.presence.out(client):  # lost: its branch is as it was before the round
            slot.reset_optimizer()
            slot.put(before[0], version=before[1])

    def _to_the_master(self, run: Run, trained: Mapping[str, str]) -> None:
        """The mean of all branches, and each branch's step towards it; at the servers, so nothing is sent."""
        whose = {branch: trained.get(branch, f"({branch})") for branch in self.names}  # the order that means sum in
        slots = {branch: run.parts.server.slots[branch] for branch in self.names}
        copies = {whose[branch]: {**_weights(self._kept.parts[branch]), **slot.get()} for branch, slot in slots.items()}
        merged = run.federated.merge(copies, dict.fromkeys(copies, 1.0))
        run.counters.merges += 1
        fit = run.federated.aggregator.fit

        def pulled(mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return blended(mine, fit(merged, {name: tuple(tensor.shape) for name, tensor in mine.items()}), self.alpha)

        for branch, slot in slots.items():
            part = self._kept.parts[branch]
            part |= pulled(_weights(part))
            slot.put(pulled(slot.get()))
        master = run.parts.server.slots[MASTER]
        master.put(fit(merged, {name: tuple(tensor.shape) for name, tensor in master.get().items()}))

    async def _replayed(self, run: Run, pairs: Mapping[str, str], number: int) -> dict[str, list[Rows]]:
        """By training client, the features that idle clients send for its branch."""
        memory = self._kept.memory
        found: dict[str, list[Rows]] = {}

        async def count(client: str) -> None:
            values = (await run.ends[client].ask("histogram")).header.values
            memory.counts[client] = {name: int(count) for name, count in values.items()}

        for client in run.clients:
            if client not in memory.counts:
                await run.reach(count, [client])
        idle = [client for client in run.present if client not in pairs]
        for client, branch in pairs.items():
            open_quota = memory.quotas(branch, round(memory.ratio * run.sizes[client]["examples"]))
            found[client] = []
            for helper in ordered(run, idle, "random", "helpers", number, branch)[: self.max_trials]:
                if not open_quota:
                    break
                head = dict(sorted(_weights(self._kept.parts[branch]).items()))
                asked: dict[str, int | str] = {"number": number, **open_quota}
                parcel = await self._features(run, helper, asked, head)
                if parcel is None or not parcel.header.names:
                    continue
                found[client].append(parcel.tensors)
                given = {name: int(parcel.header.values.get(name, 0)) for name in open_quota}
                open_quota = {n: count - given[n] for n, count in open_quota.items() if count > given[n]}
        for branch in self.names:
            for client in (c for c, b in pairs.items() if b == branch and c in memory.counts):
                memory.saw(branch, client, self.gamma)
        return found

    async def _features(
        self, run: Run, helper: str, asked: Mapping[str, int | str], head: Mapping[str, Tensor]
    ) -> Parcel | None:  # fmt: skip
        """What a helper sends; none from one that is lost."""
        found: list[Parcel] = []

        async def ask(name: str) -> None:
            found.append(await run.ends[name].ask("features", asked, **head))

        await run.reach(ask, [helper])
        return found[0] if found else None

    def evaluators(self, run: Run) -> Sequence[str]:
        """Any client: it gets the master."""
        return [newest(run)]

    def state(self) -> Mapping[str, Any]:
        """The branches' parts, and what replay remembers."""
        kept = self._kept
        tensors = {f"{branch}/{name}": t for branch, part in kept.parts.items() for name, t in part.items()}
        return {"memory": asdict(kept.memory), "versions": dict(kept.versions), **tensors}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what ``state`` gave."""
        kept = self._kept
        kept.memory, kept.versions = Memory(**state["memory"]), dict(state["versions"])
        kept.parts = {
            branch: {n.removeprefix(f"{branch}/"): t for n, t in state.items() if n.startswith(f"{branch}/")}
            for branch in kept.versions
        }


def _weights(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part without the optimizer's state."""
    return {name: tensor for name, tensor in part.items() if not name.startswith("optimizer/")}
