"""The data owner's policy: what may leave her machine, in which runs, and how much. ``guard`` holds a client to it.

It is a YAML file. A key that is left out has its default; the defaults let an ordinary run pass. See docs/policy.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cutlayer import registry
from cutlayer.allotment import Allotter
from cutlayer.arrangement import names_hosts
from cutlayer.config_read import read
from cutlayer.config_types import Count, Round, Text, Tree
from cutlayer.config_words import problems_of, show
from cutlayer.errors import ConfigError, CutlayerError, ModelError

if TYPE_CHECKING:
    from cutlayer.config import RunConfig
    from cutlayer.config_types import Spec

NEEDS = "Name at least one rule, such as: may_leave: {labels: false}"
UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})")
CHECKSUM = re.compile(r"sha256:([0-9a-f]{64})")
ANY = "any"  # of an option of a defense: the run says it
FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def _bytes(value: Any) -> Any:
    found = SIZE.fullmatch(value) if isinstance(value, str) else None
    if isinstance(value, str) and found is None:
        raise ValueError(f"must be a number of bytes, or one with a unit ({', '.join(filter(None, UNITS))}): 10 GB")
    return round(float(found[1]) * UNITS[found[2]]) if found else value


def _fingerprint(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    plain = value.strip().lower().removeprefix("sha256:").replace(":", "")
    if not FINGERPRINT.fullmatch(plain):
        raise ValueError("must be a SHA-256 fingerprint, 32 pairs of hex digits, as cutlayer keys prints it")
    return plain


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Bounds(Tree):
    """The least and the most that a number may be; both may be left out."""

    at_least: Annotated[float, Field(allow_inf_nan=False)] | None = None
    at_most: Annotated[float, Field(allow_inf_nan=False)] | None = None

    def allow(self, value: float) -> bool:
        """Whether a number is finite and within the bounds."""
        above = self.at_least is None or value >= self.at_least
        return math.isfinite(value) and above and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        said = [f"at least {self.at_least:g}"] if self.at_least is not None else []
        said += [f"at most {self.at_most:g}"] if self.at_most is not None else []
        return " and ".join(said) or "finite"


class Required(Tree):
    """A defense that a run must have: its id, and of its options a value or bounds each, or ``any``.

    An option that is not named must be the method's default: another one can undo what is named.
    """

    model_config = ConfigDict(extra="allow")
    name: Text

    def options(self) -> dict[str, Any]:
        """What is said of each option: ``Bounds``, the one value that is allowed, or ``any``."""
        given = dict(self.__pydantic_extra__ or {})
        return {name: Bounds.model_validate(v) if isinstance(v, Mapping) else v for name, v in given.items()}

    @model_validator(mode="after")
    def _bounded(self) -> Required:
        """Bounds of options are read at once, so that a mistake in them is one of the policy."""
        for name, value in (self.__pydantic_extra__ or {}).items():
            if isinstance(value, Mapping):
                wrong = sorted(set(map(str, value)) - set(Bounds.model_fields))
                if wrong or not value:
                    raise ValueError(f"{name} has {', '.join(wrong) or 'nothing'}; allowed: at_least, at_most")
                options = {key: number for key, number in value.items() if not _is_number(number)}
                if options:
                    raise ValueError(f"{name}.{next(iter(options))} must be a finite number")
        return self


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _required(value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    return [{"name": one} if isinstance(one, str) else one for one in values]


class MayLeave(Tree):
    """By kind, whether it may leave the machine."""

    activations: bool = True  # the head's output, and which of its places are padding
    gradients: bool = True  # U-shape: the gradient of what the server's blocks gave out
    labels: bool = True  # two-part split only: the tokens or classes to be learnt
    losses: bool = True  # the loss of each step (U-shape; in the two-part split the server computes it)
    token_counts: bool = True  # of each micro-batch and step
    sizes: bool = True  # of the data: examples, label tokens, steps in an epoch, batches; and of the trained part
    evaluation: bool = True  # activations of evaluation data, or a planner's; U-shape: its loss and accuracy too
    head_adapter: bool = True  # trained tensors of the first part, at step 11 or when a block moves to the server
    tail_adapter: bool = True  # those of the last part (U-shape)
    hosted: bool = True  # what was trained here for others
    peers: bool = False  # sealed from the server: what other clients are shown, and what is computed for them
    gradient_norms: bool = True  # of its own part: for clipping, and for ranks by importance
    sample_numbers: bool = False  # which of the client's samples a batch has, by their numbers
    sketches: bool = False  # of the data: mixes of labels or lengths, histograms of categories
    features: bool = False  # activations and labels that are asked for by category, to train others' models
    error_texts: bool = False  # the words of an error, which may quote a row; its kind is told anyway


class Most(Tree):
    """The most that may leave, over all that was joined with the same folder; null: no bound."""

    bytes: Annotated[Count | None, BeforeValidator(_bytes)] = None
    steps: Count | None = None  # optimizer steps that were shown, repeated ones too
    rounds: Count | None = None  # stretches of training that were followed by step 11
    epochs: Count | None = None  # passes over the training data, repeated steps too
    repeats: Round | None = None  # micro-batches shown again, after a lost connection or a resume
    evaluations: Count | None = None  # batches of evaluation data shown


class Told(Tree):
    """Bounds on numbers that the server tells. All that it tells must be finite."""

    head_weight: Bounds = Bounds(at_least=0)  # of a micro-batch's gradient
    scale: Bounds = Bounds(at_least=0)  # of a step's gradient, where the server clips
    directions: Bounds = Bounds(at_least=1)  # of a look around without backpropagation
    mu: Bounds = Bounds()  # how far it looks


class Policy(Tree):
    """A data owner's rules for a client."""

    server: Annotated[Text | None, BeforeValidator(_fingerprint)] = None  # the fingerprint of its certificate
    models: Annotated[list[Text] | None, BeforeValidator(_listed)] = None  # names, or sha256:... of its files
    served_model: bool | None = None  # blocks that the server hands; null: where nothing here relies on the model
    partitions: Annotated[list[Text] | None, BeforeValidator(_listed)] = None
    head_blocks: Round = 0  # the client's first part has at least so many blocks
    defenses: Annotated[list[Required], BeforeValidator(_required)] = Field(default_factory=list)
    may_leave: MayLeave = MayLeave()
    most: Most = Most()
    told: Told = Told()

    def problems(
        self, config: RunConfig, client: str, *, files: Mapping[str, str] | None = None, served: str | None = None,
        named: str | None = None,
    ) -> list[str]:  # fmt: skip
        """Why the client may not take part in a run, as sentences; none if it may.

        Args:
            config: the run as the server offers it, with all defaults spelled out.
            client: its name there.
            files: the SHA-256 of the model's files, by name; by default of those on this machine.
            served: of the part that the server hands, where it does; then only the server says what model it is.
            named: what the run calls the model, where ``config.model`` is the owner's own place of it.
        """
        if client not in config.client_names:
            return [f"clients: the run has no client '{client}'; it has: {', '.join(config.client_names)}."]
        return [
            *(
                self._wrong_model(named or config.model, files)
                if served is None
                else self._wrong_served(config.model, served)
            ),
            *self._wrong_cut(config, client),
            *(said for required in self.defenses for said in _missing(required, config.defense)),
            *self._wrong_kinds(config, client),
            *self._wrong_length(config),
        ]

    def _wrong_model(self, model: str, files: Mapping[str, str] | None) -> Iterator[str]:
        if self.models is None or model in self.models:
            return
        allowed = {found[1] for one in self.models if (found := CHECKSUM.fullmatch(one.lower()))}
        weights = _weights(model) if allowed and files is None else _of_weights(files or {})
        if not weights or not set(weights.values()) <= allowed:
            seen = f" Its weights are {', '.join(f'sha256:{one}' for one in weights.values())}." if weights else ""
            yield f"models: the run's model is '{model}'; allowed: {', '.join(self.models) or 'none'}.{seen}"

    def _wrong_served(self, model: str, served: str) -> Iterator[str]:
        if f"sha256:{served}" in {one.lower() for one in self.models or ()}:
            return
        trusted = self.served_model
        if trusted is None:
            trusted = self.models is None and not self.head_blocks
        if not trusted:
            why = (
                "is false"
                if self.served_model is False
                else "is not given, and models or head_blocks rely on the model"
            )
            yield (
                f"served_model {why}, but the server would hand its own. Name your copy by --model, or allow "
                f"this part of '{model}' by models: [sha256:{served}]."
            )
        elif self.models is not None and model not in self.models:
            yield f"models: the server says that its model is '{model}'; allowed: {', '.join(self.models) or 'none'}."

    def _wrong_cut(self, config: RunConfig, client: str) -> Iterator[str]:
        spec = config.partition_spec(client)
        if self.partitions is not None and spec.name not in self.partitions:
            allowed = ", ".join(self.partitions) or "none"
            yield f"partitions: the run has '{spec.name}'; allowed: {allowed}."
        blocks = _option(spec, "partition", "head_blocks")
        if isinstance(blocks, int) and blocks < self.head_blocks:
            yield f"head_blocks: the run gives '{client}' {blocks} blocks; allowed: at least {self.head_blocks}."

    def _wrong_kinds(self, config: RunConfig, client: str) -> Iterator[str]:
        """What every step, or a method of the run, would have to send."""
        needed = {"activations": "every step sends them", "token_counts": "every step tells them"}
        needed["sizes"] = "the set-up of a run tells them"
        if config.partition_spec(client).name == "two-part-split":
            needed["labels"] = "in the two-part split the server computes the loss from them"
        else:
            needed |= {"gradients": "in the U-shape every step sends them", "losses": "every step tells its loss"}
        if config.data.eval is not None or config.data.eval_fraction is not None:
            needed["evaluation"] = "the run is evaluated"
        if getattr(config.build("selection"), "asks", None) is not None:
            needed["sketches"] = f"the selection '{config.selection.name}' asks for them"
        if config.build("exchange").caches:
            needed["sample_numbers"] = f"the exchange '{config.exchange.name}' tells them for its cache"
        if config.planner is not None and config.build("planner").validation:
            needed["evaluation"] = f"the planner '{config.planner.name}' asks how well a part of the examples is known"
        if config.build("framework").merges:
            needed["head_adapter"] = f"the framework '{config.framework.name}' merges them"
        if names_hosts(config):
            needed["peers"] = f"selection '{config.selection.name}' says which client runs blocks for which"
            needed["hosted"] = f"the framework '{config.framework.name}' merges what a client trains for others"
        if isinstance(config.build("peft"), Allotter):
            needed["gradient_norms"] = f"peft '{config.peft.name}' asks how much each matrix matters"
        if config.max_grad_norm is not None:
            needed["gradient_norms"] = "max_grad_norm asks for them"
        for kind, why in needed.items():
            if not getattr(self.may_leave, kind):
                yield f"may_leave.{kind} is false, but {why}. Allow it, or do not join this run."

    def _wrong_length(self, config: RunConfig) -> Iterator[str]:
        kind, count = config.length
        most = getattr(self.most, kind)
        if most is not None and count > most:
            yield f"most.{kind}: the run has {count}; allowed: {most}."


def load_policy(source: str | Path | Mapping[str, Any]) -> Policy:
    """Read a policy: a YAML file, a YAML text (with a line break) or a mapping.

    Raises:
        ConfigError: with all its mistakes.
    """
    tree, found, where = read(source, needs=NEEDS)
    where = "the policy" if where == "the run" else where
    try:
        policy = Policy.model_validate(tree)
    except ValidationError as error:
        found += [problem.text for problem in problems_of(error, tree, Policy, what="a policy")]
    if found:
        raise ConfigError(list(dict.fromkeys(found)), where)
    return policy


def _missing(required: Required, defenses: list[Spec]) -> Iterator[str]:
    """What a run lacks of a defense that it must have."""
    there = [spec for spec in defenses if spec.name == required.name]
    if not there:
        yield f"defenses: the run lacks '{required.name}'."
        return
    found = [list(_other_options(required, spec)) for spec in there]
    if all(found):
        yield from found[0]


def _other_options(required: Required, spec: Spec) -> Iterator[str]:
    for name, wanted in required.options().items():
        value = _option(spec, "defense", name)
        if isinstance(wanted, Bounds):
            good = isinstance(value, int | float) and not isinstance(value, bool) and wanted.allow(value)
        else:
            good = wanted == ANY or _same(value, wanted)
        if not good:
            asked = wanted if isinstance(wanted, Bounds) else show(wanted)
            why = ", by the method's default; have the run say it" if name not in spec.options else ""
            yield f"defenses: the run's '{spec.name}' has {name} {show(value)}{why}; allowed: {asked}."
    for name in sorted(set(spec.options) - set(required.options())):
        default = _default(spec.name, name)
        if not _same(spec.options[name], default):
            yield (
                f"defenses: the run's '{spec.name}' has {name} {show(spec.options[name])}, of which the policy says "
                f"nothing; allowed: {show(default)}, the method's default. Name it in the policy: {name}: {ANY} lets "
                "the run say it."
            )


def _same(value: Any, wanted: Any) -> bool:
    """Whether two values of an option are the same; numbers are compared as numbers."""
    if _is_number(value) and _is_number(wanted):
        return bool(value == wanted)
    return type(value) is type(wanted) and value == wanted


def _default(defense: str, option: str) -> Any:
    """What a method has where an option is not given; None where that is nothing, or not known."""
    try:
        found = [one for one in fields(registry.load("defense", defense)) if one.name == option]
    except CutlayerError:
        return None
    if not found or (found[0].default is MISSING and found[0].default_factory is MISSING):
        return None
    return found[0].default if found[0].default_factory is MISSING else found[0].default_factory()


def _option(spec: Spec, family: str, name: str) -> Any:
    """The value of a method's option in a run, its default where it is not given; None if neither is known."""
    if name in spec.options:
        return spec.options[name]
    try:
        return getattr(registry.create(family, spec.name, spec.options), name, None)
    except CutlayerError:
        return None


def _weights(model: str) -> dict[str, str]:
    """The SHA-256 of the files with a model's weights; empty where they are not on this machine."""
    from cutlayer.identity import fingerprint

    try:
        return _of_weights(fingerprint(model))
    except ModelError:
        return {}


def _of_weights(files: Mapping[str, str]) -> dict[str, str]:
    return {name: told for name, told in files.items() if name.endswith((".safetensors", ".bin"))}
