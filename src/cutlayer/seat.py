"""A client's place in a server's run: its blocks, its data, its checkpoints and its guard.

Whatever it is asked for passes the guard, before anything is computed and again before any byte is made.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cutlayer import checkpoint
from cutlayer.agreed import AgreedSecret, needed
from cutlayer.apart import check_routes, known_classes, needs_secret
from cutlayer.asking import HOUSEKEEPING
from cutlayer.assembly import assemble_client, neighbours, routes_of
from cutlayer.build import layouts_of, prepare_own, task_of, tokenizer_of
from cutlayer.config import RunConfig
from cutlayer.contracts import SERVER
from cutlayer.defense import spent_in_words
from cutlayer.ending import Left, finished, not_finished, note_finished
from cutlayer.engine import identity
from cutlayer.entitled import entitled
from cutlayer.errors import CheckpointError, CutlayerError, OutputError, PolicyRefused, WireError
from cutlayer.files import write_text
from cutlayer.guard import Guard
from cutlayer.guarded import guarded
from cutlayer.hosting import part_of, stops_of
from cutlayer.leaving import HOST_VERBS, TRUNK_VERBS, held_by, length_of
from cutlayer.models.adapters import save_part
from cutlayer.models.families import number_of_blocks
from cutlayer.models.loading import Part, device_named, load_model
from cutlayer.models.loading import load_config as load_model_config
from cutlayer.models.segment import Base
from cutlayer.parties.client import ClientParty
from cutlayer.parties.releases import Releases
from cutlayer.parties.tails import predicting
from cutlayer.parties.verbs import VERB_STEPS
from cutlayer.parties.verbs import answer as answer_step
from cutlayer.peers import peers_of
from cutlayer.planning import at_cut
from cutlayer.plans import keep_back
from cutlayer.policy import Policy
from cutlayer.released import Counts, Log
from cutlayer.report.progress import Reporter
from cutlayer.schedule import learning_rate, planned_steps, told_of
from cutlayer.step import at
from cutlayer.trunk_slot import KeptTrunk
from cutlayer.wire import Header

BEGINNINGS = ("head_forward", "probe")
TRUNK = "trunk"  # the file in a checkpoint with what is trained for a group
Answer = tuple[Header, list[Tensor]]


class Seat:
    """A client's place in a run: its blocks, its data, its checkpoints and its guard.

    Args:
        config: the run, as the server offers it.
        name: which client it is.
        data: its own text.
        held_out: what it evaluates on, if anything.
        out: its folder.
        policy: its owner's.
        progress: is told what happens.
        base_name: what its adapter calls the model that it is of; None: where the model lies.
        agreed: the secret of the run's clients, if it has it.
        columns: what its files call the columns, where that is not what the run says.
    """

    def __init__(
        self, config: RunConfig, name: str, data: str, held_out: str | None, out: Path, policy: Policy,
        progress: Reporter, base_name: str | None = None, agreed: AgreedSecret | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.base_name = base_name or config.model
        self.config, self.name, self.out, self.progress = config, name, out, progress
        blocks = number_of_blocks(load_model_config(config.model))
        check_routes(config, blocks)
        self.agreed = needed(needs_secret(config, blocks), agreed, progress.note)
        known_classes(config)
        layouts = layouts_of(config, blocks)
        self.layout, routes = layouts[name], routes_of(config, layouts)
        self._ends = neighbours(config, routes[name])
        self.peers = peers_of(config, name, self.agreed, layouts, routes, out, policy)
        self.data, self.kept = keep_back(
            config, prepare_own(config, tokenizer_of(config), name, train=data, held_out=held_out, columns=columns)
        )
        self.sizes = told_of(config, self.data, name, self.kept[name])
        self.secret = _secret(out / "secret")
        self.most = 0  # head blocks that are loaded
        self._part: Part | None = None  # what is
        self.base: Base | None = None
        self.party: ClientParty
        if config.planner is None:  # else the server says the cut, once all clients are known
            self.party = self._party(0)
        self._begun = False  # a server has said which round it goes on from
        self._round = 0  # that is under way, or that is to begin
        self.left: Left | None = None  # the first refusal since the set-up: the run goes on without this client
        self._updates = 0  # that its part has in the run
        self._base_round, self._checkpoints, self._holds = 0, list[int](), 0  # what of its past it may be set back to
        self.guard = Guard(
            policy, Log(out / "sent.jsonl"), Counts.load(out / "sent.json"), client=name,
            entitled=entitled(config, self.layout, hosts=self.peers is not None and self.peers.may_host),
            held=lambda: held_by(self.party),
            planned=planned_steps(config, dict.fromkeys(config.client_names, self.sizes))[name],
            others=self.peers.others if self.peers else (), bytes_of=self.peers.length if self.peers else length_of,
        )  # fmt: skip
        self._answer = guarded(
            self._answered, self.guard, self.peers.opened if self.peers else None,
            self.peers.sealed if self.peers else None,
        )  # fmt: skip

    def _base(self, part: Part) -> Base:
        """The client's own blocks, and no others."""
        config, task = self.config, task_of(self.config)
        model, anatomy = load_model(
            config.model, task=task, precision=config.precision, attn_implementation=config.attn_implementation,
            labels=self.data.labels, device=device_named(config.device), seed=config.seed, part=part,
        )  # fmt: skip
        base: Base = config.build("peft").prepare(model, anatomy, task=task, seed=config.seed)
        return base

    def _party(self, updates: int, cuts: tuple[int, int] | None = None) -> ClientParty:
        """The client at its start; ``cuts`` are its head blocks now and at most, where a planner says them."""
        layout = self.layout if cuts is None else at_cut(self.layout, cuts[1])
        if self.base is None or len(layout.head) != self.most:
            part = part_of(layout, self.peers.stops if self.peers else ())
            self.base, self._part, self.most = self._base(part), part, len(layout.head)
        party = assemble_client(
            self.config, self.base, self.data, self.kept, self.name, updates=updates, secret=self.secret,
            agreed=self.agreed, cuts=cuts,
        )  # fmt: skip
        if party.defending is not None:
            party.defending.releases = Releases(self.out / "released.jsonl")
        if self.peers:
            self.peers.begin(self.base, party.slot)
        return party

    def _cuts(self, header: Header) -> tuple[int, int] | None:
        """What a planner says of the client's cut.

        Raises:
            PolicyRefused: it is below the owner's.
            WireError: it cannot be.
        """
        if self.config.planner is None:
            return None
        cut, most = int(header.value("head_blocks")), int(header.value("most"))
        if cut < self.guard.policy.head_blocks:
            raise PolicyRefused(
                "head_blocks", f"the server gives {cut} blocks; allowed: {self.guard.policy.head_blocks} or more."
            )
        if not 0 <= cut <= most < self.layout.middle.stop:
            raise WireError(f"The server gives {cut} head blocks, and {most} at most, which cannot be.")
        return cut, most

    def told(self) -> dict[str, Any]:
        """What the server is told before anything is asked: the sizes of its data, and the rounds that it holds.

        Where the clients need a secret, also what of it may be told. The guard is asked before it leaves (``greets``).
        """
        told = {"data": asdict(self.sizes), "rounds": checkpoint.rounds(self._kept)}
        return told if self.agreed is None else {**told, "secret_check": self.agreed.check}

    def handle(self, header: Header, tensors: list[Tensor]) -> Answer:
        """Answer a request.

        Raises:
            CutlayerError: it is refused; the owner was told why, and the server reads what the policy lets it read.
        """
        try:
            return self._handled(header, tensors)
        except CutlayerError as error:
            self.progress.note(f"'{header.verb}' was refused: {error}")
            if self.left is None and self._begun:
                self.left = Left(self._round, str(error))
            raise CutlayerError(self.guard.words(error, header)) from error

    def resent(self, turn: int, length: int) -> None:
        """Ask whether a reply may leave once more, whose connection broke.

        Raises:
            CutlayerError: it may not; the server reads what the policy lets it read.
        """
        try:
            self.guard.resent(turn, length)
        except CutlayerError as error:
            self.progress.note(f"the answer to request {turn} does not leave again: {error}")
            raise CutlayerError(self.guard.words(error, Header("partition", turn=turn))) from error

    def _handled(self, header: Header, tensors: list[Tensor]) -> Answer:
        if not self._begun and header.verb != "begin":
            raise WireError(f"'{header.verb}' came before 'begin': this client does not know where the run is.")
        if header.verb in HOUSEKEEPING:
            self.guard.housekeeping(header)
            getattr(self, f"_{header.verb}")(header)
            done = Header("partition", "ack", "", self.name, SERVER, self.name, turn=header.turn)
            self.guard.acknowledged(header, done)
            return done, []
        answer = self._answer(self.party, header, tensors)
        if header.verb == "set_up":  # a server that was started again, or mended, goes on with it
            self.left = None
        return answer

    def _answered(self, party: ClientParty, header: Header, tensors: Sequence[Tensor]) -> Answer:
        """The party's answer, to whoever is next on the route."""
        if self.peers is not None and header.verb in (*HOST_VERBS, *TRUNK_VERBS):
            with at(VERB_STEPS[header.verb]):
                return self.peers.answer(header, tensors)
        reply, shown = answer_step(party, header, tensors)
        first, last = self.peers.ends if self.peers is not None else self._ends
        if header.verb in BEGINNINGS:
            reply = reply.but(receiver=first)
        elif header.verb == "tail_step" and header.value("graph"):
            reply = reply.but(receiver=last)
        return reply, shown

    @property
    def done(self) -> Path | None:
        """Where this client's part of the adapter (of the model, where all weights are trained) is, once that is done.

        None: the run has not come to its end with this client.
        """
        return finished(self.out, self._identity())

    @property
    def _kept(self) -> Path:
        return self.out / "checkpoints"

    def _identity(self) -> dict[str, str]:
        return {**identity(self.config), "data": self.data.fingerprint, "client": self.name}

    def _begin(self, header: Header) -> None:
        """Be as after a round, or anew."""
        number, updates = int(header.value("round")), int(header.value("updates"))
        self._round = number
        if self.left is not None:  # for its part as it then was
            self.left = replace(self.left, rounds=number)
        not_finished(self.out)
        self.party, self._updates = self._party(updates, self._cuts(header)), updates
        self.guard.begin()
        self._base_round, self._checkpoints, self._holds = number, [], 0
        if number == 0:
            self.progress.note("the run begins")
            self._begun = True
            return
        manifest, states = checkpoint.load(self._kept / f"round-{number:06d}", expect=self._identity())
        if manifest.get("head_blocks") != len(self.party.head.blocks):
            raise CheckpointError(
                f"After round {number} this client had {manifest.get('head_blocks')} head blocks, and the server says "
                f"{len(self.party.head.blocks)}. Its folder {self.out} and the server's are not of one run."
            )
        try:
            slot = self.party.slot
            for of, one in self.party.slots.items():
                one.put(states[of], version=int(manifest["versions"][of]), resize=True)
            self._last_for(int(manifest["updates"]))
            if slot.importance is not None:
                slot.importance.restore(manifest["importance"])
            if (noted := manifest.get("trunk")) is not None:
                assert self.peers is not None
                self.peers.hosting.kept = KeptTrunk(**noted, state=states[TRUNK])
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"The checkpoint of round {number} in {self._kept} does not fit: {error}") from error
        self._begun = True
        self.progress.note(f"going on after round {number}")

    def _keep(self, header: Header) -> None:
        """Write the part of a checkpoint that is this client's."""
        number = int(header.value("round"))
        self._checkpoints.append(number)
        self._round = number
        self._write(number)

    def _hold(self, header: Header) -> None:
        """Write down how this client is at the begin of a round, which it is set back to if it is lost in it."""
        number = self._round = int(header.value("round"))
        self._write(number)
        self._holds = number

    def _write(self, number: int) -> None:
        """Write a checkpoint; those stay that the server may still go back to.

        These are its two newest, what this client was last set back to until there are two, and the last begin.
        """
        newest = self._checkpoints[-checkpoint.KEEP :]
        spared = {self._holds, *newest, *([self._base_round] if len(newest) < checkpoint.KEEP else [])}
        states = {of: one.get(optimizer=True) for of, one in self.party.slots.items()}
        told = {**self._identity(), **self._noted()}
        if self.peers is not None and (trunk := self.peers.hosting.held()) is not None:
            states[TRUNK], told["trunk"] = dict(trunk.state), trunk.noted()
        checkpoint.save(self._kept, number, states, told, spared=spared)
        self._privacy()

    def _privacy(self) -> list[dict[str, Any]]:
        """Write what the defenses have spent; the same is given."""
        defending = self.party.defending
        if defending is None or defending.releases is None:
            return []
        told = defending.told(defending.releases.sends())
        try:
            write_text(self.out / "privacy.json", json.dumps(told, indent=1))
        except OSError as error:
            raise OutputError(f"{self.out / 'privacy.json'} cannot be written: {error.strerror}.") from error
        return told

    def _noted(self) -> dict[str, Any]:
        """What of this client's state is no tensor."""
        slot = self.party.slot
        return {
            "versions": {of: one.version for of, one in self.party.slots.items()},
            "updates": self._updates, "head_blocks": len(self.party.head.blocks),
            "importance": slot.importance.state() if slot.importance is not None else None,
        }  # fmt: skip

    def _retime(self, header: Header) -> None:
        """Let the learning rate end where an arrangement of who trains with whom does."""
        self._last_for(self.party.slot.version + int(header.value("ahead")))

    def _lead(self, header: Header) -> None:
        """Follow what the run's selection says of who runs blocks for whom; what they need is loaded.

        Raises:
            PolicyRefused: it says nothing of that in this run, or the owner does not allow it.
            WireError: it cannot be.
        """
        if self.peers is None:
            raise PolicyRefused("told", "the server tells who runs blocks for whom, and in this run nobody does.")
        lead = self.peers.told(header, may=self.guard.policy.may_leave.peers)
        assert self._part is not None
        part = self._part.with_(part_of(self.layout, stops_of(lead, self.name, self.peers.layouts)))
        if part != self._part:
            self.base, self._part = self._base(part), part
            self.party.stands_on(self.base)
        assert self.base is not None
        self.peers.follow(lead, self.base)

    def _last_for(self, updates: int) -> None:
        """So many updates this client's part has in the run."""
        self._updates = updates
        self.party.slot.retime(learning_rate(self.config, updates))

    def _abort(self, header: Header) -> None:
        """Forget what is under way."""
        self.party.abort()
        if self.peers:
            self.peers.abort()
        self.guard.aborted()

    def _finish(self, header: Header) -> None:
        """Write this client's part of the adapter."""
        assert self.base is not None
        final = self.out / ("model" if self.base.peft_model is None else "adapter")
        draft = final.with_name(f".{final.name}.draft")
        own = self.party.names("own")
        if not self.config.build("framework").merges:  # then nobody else has what it trained for others
            own = self.party.names("all")
        state = {name: tensor for name, tensor in self.party.slot.get().items() if name in own}
        state |= predicting(self.party.slot)
        try:
            shutil.rmtree(draft, ignore_errors=True)
            save_part(self.base, state, draft, base_name=self.base_name)
            if final.is_dir():
                shutil.rmtree(final)
            checkpoint.move(draft, final)
            if self.left is None:
                note_finished(self.out, final, self._identity())
        except OSError as error:
            with contextlib.suppress(OSError):
                shutil.rmtree(draft)
            raise OutputError(f"{final} cannot be written: {error.strerror or error}.") from error
        for told in self._privacy():
            self.progress.note(spent_in_words(told))
        if self.left is None:
            self.progress.note(f"the run is done; this client's part of the adapter is in {final}")
        else:
            self.left = replace(self.left, part=final)


def _secret(file: Path) -> bytes:
    """The client's own secret, drawn when it first joins: what it draws privately repeats after a restart."""
    if not file.is_file():
        write_text(file, secrets.token_hex(32), mode=0o600)
    return file.read_bytes()
