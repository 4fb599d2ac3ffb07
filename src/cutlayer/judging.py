"""What a client elsewhere may answer: every reply is judged before anybody uses it.

A client is another's machine. Of what it sends, names, shapes, types and bounds are checked here, and that all is
finite, so that a client that misbehaves is lost alone, and not the run. What is well-formed but false (a gradient that
harms, a loss that was not computed) cannot be seen here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from cutlayer._judging import BatchChecks, Bounds, named
from cutlayer.asking import HOUSEKEEPING
from cutlayer.build import task_of
from cutlayer.config import RunConfig
from cutlayer.models.importance import UNKNOWN
from cutlayer.models.loading import DTYPES
from cutlayer.models.segment import Base
from cutlayer.models.slots import NUMBER, Slot, parameter_of
from cutlayer.parties.helping import PREFIX
from cutlayer.parties.holder import Holder
from cutlayer.ranks import pairs
from cutlayer.schedule import ENDLESS, Told
from cutlayer.sealing import is_sealed
from cutlayer.wire import SEAL_BYTES, SEALED, Header, Value

__all__ = ["Bounds", "Judge", "bounds_of"]

MOST = float(torch.finfo(torch.float32).max)  # of a loss, so that sums of them stay finite
PROBE = 2  # the size of each dimension where an optimizer's state is learnt

ANY = "*"  # of several that may be
# By verb, in which step its reply is sent, and of which kind it is.
REPLIES: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("set_up", "histogram"), ("partition", "ack")),
    **dict.fromkeys(HOUSEKEEPING, ("partition", "ack")),
    "sketch": ("partition", "sketch"),
    **dict.fromkeys(("head_forward", "probe", "features"), ("send_activations", "activations")),
    "tail_step": ("send_gradients", "gradient"),
    "host_backward": ("return_gradients", ANY),
    "host_tail_step": ("return_gradients", ANY),
    "host_forward": (ANY, "activations"),
    **dict.fromkeys(("head_backward", "probed", "grad_norm", "update"), ("head_backward", "ack")),
    **dict.fromkeys(("host_update", "host_norm"), ("trunk_backward", "ack")),
    "host_get": ("aggregate", "state"),
    "host_put": ("aggregate", "ack"),
    **dict.fromkeys(("move", "importance"), ("partition", "state")),
    **dict.fromkeys(("begin_stage", "set_state"), ("aggregate", "ack")),
    **dict.fromkeys(("end_stage", "get_state"), ("aggregate", "state")),
}


def bounds_of(config: RunConfig, base: Base, name: str) -> Bounds:
    """The bounds of a client's batches in a run."""
    causal, model = task_of(config) == "causal", base.model.config
    dtypes = [DTYPES[config.precision]]
    if getattr(model, "residual_in_fp32", False):  # the blocks of Mamba and its kin; what embeddings give is not
        dtypes.append(torch.float32)
    return Bounds(
        rows=config.batch_size, length=max(config.data.max_length, config.data_of(name).max_length),
        micros=config.gradient_accumulation, hidden=model.hidden_size,
        labels=model.vocab_size if causal else model.num_labels, causal=causal,
        dtypes=tuple(dict.fromkeys(dtypes)), sketch=getattr(config.build("selection"), "asks", None),
    )  # fmt: skip


@dataclass(frozen=True)
class _Answer:
    """A request with its tensors, and what was answered."""

    asked: Header
    given: Mapping[str, Tensor]
    values: Mapping[str, Value]
    found: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Batch:
    """What a client said of a batch that it showed."""

    rows: int
    length: int
    last: bool


class Judge(BatchChecks):
    """Judges the replies of one client, in their order.

    Args:
        name: the client's.
        bounds: of its batches.
        told: what it said of its data when it came.
        shadow: has the names and shapes of its tensors.
        remembers: whether the server has what it showed of a sample, where it caches that.
        others: the run's other clients; what is for one of them must be sealed, and who opens it judges it.
    """

    def __init__(
        self, name: str, bounds: Bounds, told: Told, shadow: Holder, remembers: Callable[[int], bool] = lambda _: True,
        others: Collection[str] = (),
    ) -> None:  # fmt: skip
        super().__init__(name, bounds)
        self.told, self.shadow, self.remembers, self.others = told, shadow, remembers, frozenset(others)
        self._open: dict[tuple[int, int], _Batch] = {}  # of training, by step and micro-batch
        self._tells_step_tokens = self._caches = False
        self._moments: dict[tuple[int, torch.dtype], dict[str, tuple[int, ...]]] = {}

    def __call__(self, asked: Header, given: Sequence[Tensor], reply: Header, tensors: Sequence[Tensor]) -> None:
        """Judge the reply to a request with the tensors ``given``.

        Raises:
            WireError: it is none that a client of this run can give.
        """
        self._verb, found = asked.verb, dict(zip(reply.names, tensors, strict=True))
        step_name, kind = REPLIES.get(asked.verb, (reply.step_name, reply.kind))
        passed_on = reply.receiver in self.others
        stays = reply.receiver == self.name  # its own blocks come next, so that nothing leaves it
        if asked.verb in ("tail_step", "host_tail_step") and not asked.values.get("graph"):
            step_name, kind = "tail_step", "ack"
        elif asked.verb == "features" and not found:
            kind = "ack"
        for what, here, wanted in (
            ("kind", reply.kind, kind), ("step name", reply.step_name, step_name), ("client", reply.client, self.name),
            ("verb", reply.verb, ""), ("slot", reply.slot, asked.slot), ("step", reply.step, asked.step),
            ("micro-batch", reply.micro, asked.micro),
        ):  # fmt: skip
            if here != wanted and wanted != ANY:
                self._fail(f"the {what} '{here}'", f"'{wanted}'")
        if passed_on and not is_sealed(reply):
            self._fail("an open frame for another client", "a sealed one")
        self._all_finite(reply.values, found)
        judged: Callable[[_Answer], None] | None = getattr(self, f"_on_{asked.verb}", None)
        if stays:
            self._only(reply.values, found)
        elif passed_on:
            self._sealed(reply, found)
        elif judged is not None:
            judged(_Answer(asked, dict(zip(asked.names, given, strict=True)), reply.values, found))
        elif kind == "ack":
            self._only(reply.values, found)

    def _sealed(self, reply: Header, found: Mapping[str, Tensor]) -> None:
        """What is for another client: who opens it judges what is inside."""
        self._only(reply.values, found, (), [SEALED])
        box = found[SEALED]
        if box.dim() != 1 or box.dtype != torch.uint8 or len(box) <= SEAL_BYTES:
            self._fail(f"'{SEALED}' as {named(box)}", f"more than {SEAL_BYTES} torch.uint8")

    def _on_host_tail_step(self, it: _Answer) -> None:
        self._only(it.values, it.found, ["loss", "tokens", "label_tokens", "correct"])
        self._number(it.values, "loss", -MOST, MOST)
        self._counts(it.values, self.bounds.rows, self.bounds.length, None)
        self._whole(it.values, "correct", int(it.values["label_tokens"]))

    # ------------------------------------------------------------ a trunk that it trains for its group

    def _on_host_get(self, it: _Answer) -> None:
        self._only(it.values, (), ["version"])
        self._whole(it.values, "version", ENDLESS)
        trunk = self._trunk
        self._state(it.found, trunk.params.keys(), optimizer=bool(it.asked.value("optimizer")), slot=trunk)

    def _on_host_update(self, it: _Answer) -> None:
        self._only(it.values, it.found, ["version"])
        self._whole(it.values, "version", ENDLESS)

    def _on_host_norm(self, it: _Answer) -> None:
        self._only(it.values, it.found, ["squared_norm"])
        self._number(it.values, "squared_norm", 0.0, MOST * MOST * len(self._trunk.params))

    @property
    def _trunk(self) -> Slot:
        assert self.shadow.trunk is not None  # as it was asked for
        return self.shadow.trunk

    # ------------------------------------------------------------ set-up

    def _on_set_up(self, it: _Answer) -> None:
        told, own = self.told, self.shadow.names("own")
        self._tells_step_tokens = bool(it.asked.values.get("tell_step_tokens"))
        self._caches = bool(it.asked.values.get("cache"))
        said = {
            "examples": told.examples, "label_tokens": told.label_tokens, "steps_per_epoch": told.steps_per_epoch,
            "evaluation_batches": told.evaluation_batches,
            "trainable": sum(t.numel() for n, t in self.shadow.slot.get().items() if n in own),
        }  # fmt: skip
        self._only(it.values, it.found, values_needed=said)
        for name, wanted in said.items():
            if type(it.values[name]) is not int or it.values[name] != wanted:
                self._fail(f"{name} {it.values[name]!r}", f"{wanted}, as it said when it came")

    def _on_sketch(self, it: _Answer) -> None:
        self._only(it.values, it.found, (), ["sketch"])
        sketch = self.bounds.sketch
        assert sketch is not None  # as it was asked for
        self._like(
            it.found, "sketch", sketch.shape(classes=self.bounds.labels, hidden=self.bounds.hidden), sketch.dtype
        )
        if not sketch.possible(it.found["sketch"]):
            self._fail("a sketch that cannot be", "proportions, or a vector of length 1")

    def _on_histogram(self, it: _Answer) -> None:
        self._only(it.values, it.found, values_needed=self._categories(it.values, self.told.examples))

    def _categories(self, values: Mapping[str, Value], most: int) -> list[str]:
        """The names of counts by category, which must not be more than ``most`` in all."""
        for name in values:
            number = name.removeprefix(PREFIX)
            if not name.startswith(PREFIX) or not (number.isascii() and number.isdigit()):
                self._fail(f"the value '{name}'", "counts by category")
            self._whole(values, name, most)
        if sum(map(int, values.values())) > most:
            self._fail(f"{sum(map(int, values.values()))} examples", f"at most {most}")
        return list(values)

    # ------------------------------------------------------------ steps

    def _on_begin(self, it: _Answer) -> None:
        self._only(it.values, it.found)
        self._open.clear()

    _on_abort = _on_begin

    def _on_head_forward(self, it: _Answer) -> None:
        training, ends = bool(it.asked.value("graph")), self.shadow.tail is None
        samples = training and self._caches
        known = samples and it.asked.step >= self.told.steps_per_epoch  # the server has all that would be shown
        needed = [] if known else ["hidden", *(["labels"] if ends else [])]
        spare = [] if known else ["mask", "positions"]
        says = ["last", "needs_gradient", *(["weight", "tokens", "label_tokens"] if ends else [])]
        says += ["step_tokens"] if ends and training and self._tells_step_tokens else []
        self._only(it.values, it.found, says, [*needed, *(["samples"] if samples else [])], spare)
        self._flag(it.values, "needs_gradient")
        rows, length = self._samples(it.found["samples"]) if known else self._batch(it.found, it.found["hidden"])
        if known and (new := [one for one in it.found["samples"].tolist() if not self.remembers(one)]):
            self._fail(f"only the number of sample {new[0]}", "a sample that it has shown before")
        if samples and not known and self._samples(it.found["samples"])[0] != rows:
            self._fail(f"{len(it.found['samples'])} sample numbers", f"one for each of {rows} rows")
        self._began(it.asked, it.values, rows, length, training=training)
        if ends:
            self._counts(it.values, rows, length, it.found.get("labels"))

    def _on_probe(self, it: _Answer) -> None:
        points = [f"{side}.{n}" for n in range(int(it.asked.value("directions"))) for side in ("plus", "minus")]
        says = ["last", "weight", "tokens", "label_tokens"]
        self._only(it.values, it.found, says, ["hidden", "labels", *points], ["mask", "positions"])
        rows, length = self._batch(it.found, it.found["hidden"])
        for name in points:
            self._like(it.found, name, it.found["hidden"].shape, it.found["hidden"].dtype)
        self._began(it.asked, it.values, rows, length, training=True)
        self._counts(it.values, rows, length, it.found["labels"])

    def _on_features(self, it: _Answer) -> None:
        wanted = {name: int(count) for name, count in it.asked.values.items() if name.startswith(PREFIX)}
        needed = ["hidden", "labels"] if it.found else []
        self._only(it.values, it.found, (), needed, ["mask", "positions"], values_spare=wanted)
        for name in it.values:
            self._whole(it.values, name, wanted[name])
        rows = sum(map(int, it.values.values()))
        if not it.found and rows:
            self._fail(f"counts of {rows} rows", "these rows")
        if it.found and self._batch(it.found, it.found["hidden"], most=rows)[0] != rows:
            self._fail(f"{len(it.found['hidden'])} rows", f"{rows}, as it counts them")

    def _on_tail_step(self, it: _Answer) -> None:
        shown = it.given.get("hidden")  # None: it was sealed, so that it is not known how large the batch is
        rows, length = (self.bounds.rows, self.bounds.length) if shown is None else shown.shape[:2]
        if not it.asked.values.get("graph"):
            self._only(it.values, it.found, ["loss", "tokens", "label_tokens", "last", "correct"])
            self._flag(it.values, "last")
            self._number(it.values, "loss", -MOST, MOST)
            self._counts(it.values, rows, length, None)
            self._whole(it.values, "correct", int(it.values["label_tokens"]))
            return
        self._only(it.values, it.found, ["last", *(["step_tokens"] if self._tells_step_tokens else [])], ["hidden"])
        if shown is not None:
            self._like(it.found, "hidden", shown.shape, shown.dtype)
        self._same_end(it.asked, it.values)
        if self._tells_step_tokens:
            self._whole(it.values, "step_tokens", self.bounds.micros * self.bounds.rows * self.bounds.length)

    def _on_head_backward(self, it: _Answer) -> None:
        self._only(it.values, it.found, ["loss", "tokens", "label_tokens", "last"])
        self._same_end(it.asked, it.values)
        batch = self._open.pop((it.asked.step, it.asked.micro), None)
        rows, length = (batch.rows, batch.length) if batch else (self.bounds.rows, self.bounds.length)
        self._counts(it.values, rows, length, None)
        self._number(it.values, "loss", -MOST, MOST)
        told = self.shadow.tail is None and "loss" in it.asked.values  # else another client computed it, or itself
        if told and it.values["loss"] != it.asked.value("loss"):
            self._fail(f"the loss {it.values['loss']}", f"that which it was told, {it.asked.value('loss')}")

    def _on_probed(self, it: _Answer) -> None:
        self._only(it.values, it.found)
        self._open.pop((it.asked.step, it.asked.micro), None)

    def _on_grad_norm(self, it: _Answer) -> None:
        self._only(it.values, it.found, ["squared_norm"])
        self._number(it.values, "squared_norm", 0.0, MOST * MOST * len(self.shadow.slot.params))

    def _began(
        self, asked: Header, values: Mapping[str, Value], rows: int, length: int, *, training: bool
    ) -> None:  # fmt: skip
        self._flag(values, "last")
        if training:
            if not values["last"] and asked.micro + 1 >= self.bounds.micros:
                self._fail(f"a micro-batch {asked.micro + 2}", f"at most {self.bounds.micros} in a step")
            self._open[asked.step, asked.micro] = _Batch(rows, length, bool(values["last"]))

    def _same_end(self, asked: Header, values: Mapping[str, Value]) -> None:
        self._flag(values, "last")
        batch = self._open.get((asked.step, asked.micro))
        if batch is not None and values["last"] != batch.last:
            self._fail(f"last {values['last']}", f"{batch.last}, as it said before")

    def _samples(self, samples: Tensor) -> tuple[int, int]:
        """How many there are, and the most tokens that each may have."""
        if samples.dim() != 1 or not 0 < len(samples) <= self.bounds.rows or samples.dtype != torch.int64:
            self._fail(f"'samples' as {named(samples)}", f"at most [{self.bounds.rows}] torch.int64")
        self._within({"samples": samples}, "samples", 0, self.told.examples)
        if len(set(samples.tolist())) < len(samples):
            self._fail("a sample's number twice", "each once")
        return len(samples), self.bounds.length

    # ------------------------------------------------------------ states

    def _on_get_state(self, it: _Answer) -> None:
        self._only(it.values, (), ["version"])
        self._whole(it.values, "version", ENDLESS)
        self._state(
            it.found, self.shadow.names(str(it.asked.value("part"))), optimizer=bool(it.asked.value("optimizer"))
        )

    def _on_move(self, it: _Answer) -> None:
        head, tail = self.shadow.head, self.shadow.tail
        stays = head.base.segment("head", range(int(it.asked.value("head_blocks"))), bottom=True).names
        leaving = self.shadow.names("own") - {*stays, *(tail.names if tail else [])}
        self._only(it.values, ())
        self._state(it.found, leaving, optimizer=True)

    def _on_importance(self, it: _Answer) -> None:
        self._only(it.values, it.found, (), ["importance"])
        self._like(it.found, "importance", (len(pairs(self.shadow.names("own"))),), torch.float64)
        if bool(((it.found["importance"] < 0) & (it.found["importance"] != UNKNOWN)).any()):
            self._fail("an importance below 0", f"numbers from 0, or {UNKNOWN:g}")

    def _state(
        self, found: Mapping[str, Tensor], names: Collection[str], *, optimizer: bool, slot: Slot | None = None
    ) -> None:
        """A slot's tensors of these names, each as it is here; with all of their optimizer's state, or none of it."""
        held = {name: tensor for name, tensor in (slot or self.shadow.slot).get().items() if name in names}
        beside = [name for name in found if name not in held]
        self._only({}, found, (), held, beside if optimizer else ())
        for name, tensor in held.items():
            self._like(found, name, tensor.shape, tensor.dtype)
        by: dict[str, dict[str, Tensor]] = {}
        for name in beside:
            owner, key = parameter_of(name), name.rpartition("/")[2]
            if owner == name or owner not in held:
                self._fail(f"the tensor '{name}'", "tensors of its own part")
            by.setdefault(owner, {})[key] = found[name]
        for owner, moments in by.items():
            like = self._moments_of(held[owner])
            if moments.keys() != like.keys():
                self._fail(f"of '{owner}' the optimizer's {sorted(moments)}", f"{sorted(like)}")
            for key, tensor in moments.items():
                if tensor.shape != like[key] or not tensor.is_floating_point():
                    self._fail(f"'{key}' of '{owner}' as {named(tensor)}", f"floating {list(like[key])}")

    def _moments_of(self, tensor: Tensor) -> dict[str, tuple[int, ...]]:
        """The shape of each part of the state that the run's optimizer keeps for a tensor, learnt from a small step."""
        kind = tensor.dim(), tensor.dtype
        if kind not in self._moments:
            probe = Parameter(torch.zeros((PROBE,) * tensor.dim(), dtype=tensor.dtype, device=tensor.device))
            probe.grad = torch.zeros_like(probe)
            optimizer = self.shadow.slot.new_optimizer([probe])
            optimizer.step()
            self._moments[kind] = {
                key if isinstance(value, Tensor) else key + NUMBER: tuple(torch.as_tensor(value).shape)
                for key, value in optimizer.state[probe].items()
                if value is not None
            }
        return {
            key: tuple(own if seen == PROBE else 1 for own, seen in zip(tensor.shape, shape, strict=bool(shape)))
            for key, shape in self._moments[kind].items()
        }
