"""From profiles to durations: how long each verb's work takes at each party on the virtual clock."""

from __future__ import annotations

from functools import lru_cache

from cutlayer.build import Parts, task_of
from cutlayer.config import RunConfig
from cutlayer.costs import Profile, Training, Work, profile_from, seconds, shape_of
from cutlayer.errors import ConfigError
from cutlayer.links.local import Pace


def paces(config: RunConfig, parts: Parts) -> tuple[dict[str, Pace | None], Pace | None]:
    """The pace of each client and of the server; all None where the run has no profile.

    Raises:
        ConfigError: some clients have a profile and some have none, so that their times could not be compared.
    """
    profiles = {
        c.name: profile_from(c.profile if c.profile is not None else config.profile) for c in config.client_list
    }
    without = [name for name, profile in profiles.items() if profile is None]
    if len(without) == len(profiles):
        return dict.fromkeys(profiles, None), None
    if without:
        raise ConfigError(
            [f"client '{without[0]}' has no profile, but others have. Give it one, or set profile for all."]
        )
    shape = shape_of(parts.base.model.config, task=task_of(config))
    training = training_of(config)
    layout = parts.layout
    rest = layout.trunk if layout.tail_at_client else layout.tail
    trained_head = any(
        parts.base.owner(n) == "bottom" or n in parts.clients[config.client_names[0]].head.names
        for n in parts.base.initial
    )

    @lru_cache
    def work(length: int) -> Work:
        return Work(shape, length=length, training=training)

    def client_seconds(profile: Profile, verb: str, rows: int, length: int, graph: bool) -> float:
        cost = work(length)
        flop = {
            "head_forward": lambda: cost.forward(layout.head),
            "tail_step": lambda: (
                cost.forward(layout.tail, lm_head=True)
                + (cost.backward(layout.tail, lm_head=True, input_gradient=True) if graph else 0.0)
            ),
            "head_backward": lambda: cost.backward(layout.head, input_gradient=False),
        }.get(verb)
        return seconds(flop() * rows * length, profile) if flop else 0.0

    def server_seconds(profile: Profile, verb: str, rows: int, length: int, graph: bool) -> float:
        cost, top = work(length), not layout.tail_at_client
        flop = 0.0
        if verb in ("forward", "tail_step"):
            flop += cost.forward(rest, lm_head=top)
        if verb in ("backward", "tail_step") and graph:
            flop += cost.backward(rest, lm_head=top, input_gradient=trained_head)
        return seconds(flop * rows * length, profile)

    server = profile_from("server")
    assert server is not None
    clients: dict[str, Pace | None] = {
        name: Pace(profile, client_seconds) for name, profile in profiles.items() if profile is not None
    }
    return clients, Pace(server, server_seconds)


def training_of(config: RunConfig) -> Training:
    """What is trained, as the cost model says it (a rank pattern counts as the plain rank)."""
    options = config.peft.options
    head = task_of(config) == "classification"
    if config.peft.name == "full":
        return Training(full=True)
    targets = options.get("targets", "all-linear")
    return Training(
        rank=options.get("rank", 8),
        targets=[targets] if targets != "all-linear" and isinstance(targets, str) else targets,
        head=head,
    )
