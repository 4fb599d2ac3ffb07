"""A run as one typed tree: what the YAML may say, checked whole before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError

from cutlayer import registry
from cutlayer.config_check import check_profile, problems
from cutlayer.config_optimizer import OptimizerConfig
from cutlayer.config_read import Overrides, numbered, read
from cutlayer.config_types import (
    Chance,
    Codec,
    CodecConfig,
    Count,
    Format,
    Losses,
    Many,
    Maybe,
    One,
    Precision,
    Profile,
    Profiles,
    Round,
    Spec,
    Text,
    Tree,
)
from cutlayer.config_words import problems_of
from cutlayer.config_write import dump, family_keys, family_of, filled, resolved, tree_of, with_files
from cutlayer.errors import ConfigError, MethodError
from cutlayer.identity import identity_of
from cutlayer.seeds import derive

__all__ = [
    "ClientConfig", "ClientData", "CodecConfig", "DataConfig", "EarlyStop", "EngineConfig", "Many", "Maybe", "One",
    "OptimizerConfig", "RunConfig", "Spec", "check_profile", "dump", "filled", "load_config", "resolved",
]  # fmt: skip


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _train(value: Any) -> Any:
    return {"train": value} if isinstance(value, str) else value


def _clients(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | list):
        raise ValueError("must be a number of clients, or a list of clients with a name each")
    return value


def _counted(value: Any) -> str:
    return "list" if isinstance(value, list) else "number"


def _engine(value: Any) -> Any:
    if not isinstance(value, str | Mapping | EngineConfig):
        raise ValueError("must be local or ray, or {name: ray, option: value}")
    return _named(value)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class DataConfig(Tree):
    """Where the text is, what form it has, and how it is divided over the clients."""

    train: str = ""  # file, glob, or a Hub data set; may be left out only if every client has data of its own
    eval: Text | None = None
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    format: Format = "text"
    columns: dict[str, str] = Field(default_factory=dict)  # our name -> the file's column
    classes: list[Text] | None = None  # of classification, in the order of their numbers; None: those of the data
    max_length: Annotated[int, Field(ge=2)] = 1024  # tokens, after appending
    append_eos: bool = True
    completion_only: bool = True  # for the formats that have completions; the others have nothing to leave out
    packing: bool = False
    padding_side: Literal["right", "left"] = "right"
    shuffle: bool = True
    division: One = Spec(name="iid")


class ClientData(Tree):
    """A client's own file, and how it differs from ``data`` in form; the rest is that of ``data``."""

    train: Text
    format: Format | None = None
    columns: dict[str, str] | None = None


class ClientConfig(Tree):
    """One client by name, with what it has of its own."""

    name: str
    data: Annotated[ClientData | None, BeforeValidator(_train)] = None
    profile: Profile = None
    head_blocks: Annotated[int, Field(ge=0)] | None = None
    tail_blocks: Annotated[int, Field(ge=0)] | None = None
    joins: Round = 0  # the first round that it is there for
    leaves: Round | None = None  # the first that it is gone from, for good
    availability: Chance | None = None
    fails: Losses | None = None


class EarlyStop(Tree):
    """Stop after ``patience`` evaluations in a row that are not better than the best by more than ``min_delta``."""

    patience: Count
    min_delta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class EngineConfig(Tree):
    """Where the clients of a run, and its trunk, are: in this process, or in actors on a Ray cluster."""

    name: Literal["local", "ray"] = "local"
    address: Text | None = None  # of a Ray cluster; null starts one on this machine, auto takes the one that runs
    clients_per_actor: Count | None = None  # null: as many actors as there is room for
    num_cpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0  # of each actor
    num_gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # of each actor of clients
    trunk_stages: Count | None = None  # actors that a trunk's blocks are cut over; null: 1 with replicas, else none
    trunk_replicas: Count | None = None  # actors that a framework's trunks are dealt over, each with its own base
    trunk_gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # of each actor of the trunk

    @property
    def trunk_apart(self) -> bool:
        """Whether the trunk is in actors."""
        return self.trunk_stages is not None or self.trunk_replicas is not None


class RunConfig(Tree):
    """A whole run: the keys and defaults of a run file."""

    model: Text  # a Hub name or a folder
    data: DataConfig
    clients: Annotated[
        Annotated[Count, Tag("number")] | Annotated[list[ClientConfig], Tag("list")],
        Discriminator(_counted),
        BeforeValidator(_clients),
    ] = 3
    partition: One = Spec(name="u-shaped-split")
    peft: One = Spec(name="lora")
    framework: One = Spec(name="sfl-v2")
    aggregator: One = Spec(name="fedavg")
    planner: Maybe = None
    selection: One = Spec(name="all")
    scheduler: One = Spec(name="fifo")
    mixing: Maybe = None
    exchange: One = Spec(name="plain")
    overlap: Maybe = None
    objective: Maybe = None
    defense: Many = Field(default_factory=list)
    codec: Codec = CodecConfig()
    monitor: Many = Field(default_factory=list)
    attack: Many = Field(default_factory=list)
    optimizer: Annotated[OptimizerConfig, BeforeValidator(_named)] = OptimizerConfig()
    rate: Maybe = None
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    batch_size: Count = 4
    gradient_accumulation: Count = 1
    rounds: Count | None = None
    steps: Count | None = None  # optimizer steps of each client
    epochs: Count | None = None
    eval_every: Count | None = None  # rounds
    early_stop: EarlyStop | None = None
    checkpoint_every: Count = 1  # rounds
    precision: Precision = "float32"
    attn_implementation: Text | None = None
    gradient_checkpointing: bool = False
    verify: Literal["auto", "always"] = "auto"  # compare the cut model with the uncut one at the start
    device: str = "auto"
    engine: Annotated[EngineConfig, BeforeValidator(_engine)] = EngineConfig()
    profile: Profiles = None  # of the virtual clock, for all clients that have none; of a list each draws one
    profiles: dict[str, Profile] = Field(default_factory=dict)  # of other parties: the server, edges
    availability: Chance = 1.0  # the probability that a client is there in a round
    fails: Losses = 0.0  # the probability that a client is lost in the middle of a round, or the rounds in which
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    record_wire: Text | None = None
    report_to: Annotated[list[str], BeforeValidator(_listed)] = Field(default_factory=list)

    @property
    def length(self) -> tuple[Literal["rounds", "steps", "epochs"], int]:
        """How long the run is, and in what; ten rounds if nothing was said."""
        if self.steps is not None:
            return "steps", self.steps
        if self.epochs is not None:
            return "epochs", self.epochs
        return "rounds", self.rounds or 10

    @property
    def client_list(self) -> list[ClientConfig]:
        """The clients one by one, also where the run only counts them."""
        if isinstance(self.clients, int):
            return list(_anonymous(self.clients))
        return self.clients

    @property
    def client_names(self) -> list[str]:
        """The clients' names, in order."""
        return [client.name for client in self.client_list]

    def client(self, name: str) -> ClientConfig:
        """What is said of one client."""
        return next(client for client in self.client_list if client.name == name)

    def profile_of(self, client: str) -> str | dict[str, Any] | None:
        """A client's own profile, or the run's; of a list of the run's one that is drawn from the seed, by client."""
        own, common = self.client(client).profile, self.profile
        if own is None and isinstance(common, list):
            return common[derive(self.seed, "profile", client) % len(common)]
        return own if own is not None or isinstance(common, list) else common

    def data_of(self, client: str) -> DataConfig:
        """``data``, with what the client has of its own in place of ``train``, ``format`` and ``columns``."""
        own = self.client(client).data
        return self.data.model_copy(update=own.model_dump(exclude_none=True)) if own else self.data

    def partition_spec(self, client: str) -> Spec:
        """The partition with the client's own cut, where it has one."""
        own = self.client(client)
        cuts = {"head_blocks": own.head_blocks, "tail_blocks": own.tail_blocks}
        given = {key: value for key, value in cuts.items() if value is not None}
        return Spec(name=self.partition.name, **{**self.partition.options, **given})

    def methods(self) -> Iterator[tuple[str, str, Spec]]:
        """Every chosen method: its dotted key, its family and what is said of it."""
        yield "data.division", "data", self.data.division
        for key in FAMILY_KEYS:
            value, family = getattr(self, key), family_of(key)
            if isinstance(value, CodecConfig):
                legs = {"codec.up": value.up, "codec.down": value.down}
                yield from ((leg, family, spec) for leg, spec in legs.items() if spec)
            elif isinstance(value, list):
                yield from ((f"{key}.{number}", family, spec) for number, spec in enumerate(value))
            elif value is not None:
                yield key, family, value

    def build(self, key: str) -> Any:
        """A new instance of the one method of a family (or at a key: ``codec.up``), or None where none is chosen."""
        built = self.build_all(key)
        if len(built) > 1:
            raise MethodError(f"The run has {len(built)} methods at '{key}', where one is asked for.")
        return built[0] if built else None

    def build_all(self, key: str) -> list[Any]:
        """New instances of all methods of a family, or at a key, in order."""
        assert key in registry.FAMILIES or key in ("codec.up", "codec.down"), key
        return [registry.create(fam, spec.name, spec.options) for k, fam, spec in self.methods() if key in (k, fam)]

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """What must be equal for a checkpoint to be of this run; of its files as they were when it was first asked."""
        return identity_of(self)

    def check(self) -> None:
        """Everything that can be checked without a model: values that exclude each other, methods and their options.

        Raises:
            ConfigError: with all mistakes.
        """
        if found := problems(self):
            raise ConfigError(found, "the run")


@lru_cache
def _anonymous(count: int) -> tuple[ClientConfig, ...]:
    """Clients that are only counted; made once, for they are asked for by every client's name."""
    return tuple(ClientConfig(name=name) for name in numbered(count))


FAMILY_KEYS = family_keys(RunConfig)
DEFAULT_METHODS = {
    "data.division": "iid",
    **{key: spec.name for key in FAMILY_KEYS if isinstance(spec := RunConfig.model_fields[key].default, Spec)},
}


def load_config(
    source: str | Path | Mapping[str, Any] | RunConfig, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> RunConfig:
    """Read a run, set the overrides and check it whole; the result has all defaults and all options spelled out.

    Args:
        source: a YAML file's path, a YAML text (with a line break), a mapping or a run.
        overrides: ``key=value`` texts (the value is read as YAML), or a mapping of dotted keys to values.

    Raises:
        ConfigError: with all mistakes of the run at once.
    """
    if isinstance(source, RunConfig):
        source = tree_of(source)
    tree, found, where = read(source)
    families = [*FAMILY_KEYS, "data.division", "optimizer"]
    found += Overrides(tree, defaults=DEFAULT_METHODS, families=families).apply(overrides)
    config, wrong, doubtful = _parsed(tree)
    base = Path(where).parent if where != "the run" else None
    config = with_files(config, base)
    found += [*wrong, *problems(config, doubtful)]
    if found:
        raise ConfigError(list(dict.fromkeys(found)), where)
    return filled(config)


def _parsed(tree: dict[str, Any]) -> tuple[RunConfig, list[str], frozenset[str]]:
    """The typed run, the mistakes on the way, and the keys that hold a stand-in because of them."""
    found: dict[str, None] = {}
    doubtful: set[str] = set()
    while True:
        try:
            return RunConfig.model_validate(tree), list(found), frozenset(doubtful)
        except ValidationError as error:
            for problem in problems_of(error, tree, RunConfig):
                found[problem.text] = None
                doubtful |= set(problem.doubtful)
                tree = _healed(tree, problem.loc)


def _healed(tree: dict[str, Any], loc: tuple[str | int, ...]) -> dict[str, Any]:
    """The tree without the mistake, so that the rest of it can be looked at too."""
    top, *rest = loc
    if top == "model":
        return {**tree, "model": "stand-in"}
    if top == "data" and rest and isinstance(tree.get("data"), dict):
        return {**tree, "data": {key: value for key, value in tree["data"].items() if key != rest[0]}}
    if top == "data":
        return {**tree, "data": {}}
    return {key: value for key, value in tree.items() if key != top}
