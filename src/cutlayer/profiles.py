"""How fast a device and its link are: presets, or the user's numbers.

The presets are OUR assumptions: round numbers for sustained training speed (not a peak of a data sheet) and everyday
links, cited from nowhere. A study that depends on them should measure its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cutlayer.errors import ConfigError, suggest

GB = 10**9
MBIT = 10**6

# device -> sustained FLOP/s, memory in GB
DEVICES: Mapping[str, tuple[float, float]] = {
    "phone": (1e11, 4),  # the CPU of a current phone, what one app may use
    "laptop": (5e11, 16),  # a laptop's CPU
    "edge-box": (2e12, 8),  # a small embedded GPU
    "workstation": (1e13, 24),  # one consumer GPU
    "server": (1e14, 80),  # one data-centre GPU, bf16
}

# link -> up Mbit/s, down Mbit/s, round trip in ms
LINKS: Mapping[str, tuple[float, float, float]] = {
    "4g": (10, 30, 50),
    "5g": (50, 200, 20),
    "dsl": (10, 50, 25),
    "fibre": (200, 500, 10),
    "lan": (1000, 1000, 0.5),
}

_KEYS = ("flops", "up_mbps", "down_mbps", "rtt_ms", "memory_gb", "workers", "device", "link", "name")


@dataclass(frozen=True)
class Profile:
    """One party: ``flops`` in FLOP/s, ``up`` and ``down`` in bit/s, ``rtt`` in seconds, ``memory`` in bytes.

    The link is the one between a client and the server, seen from the client: ``up`` carries activations. A server's
    own link is not counted again. ``memory`` None is unlimited. ``workers`` is how many steps it works on at a time,
    each at the full speed (a server with several GPUs).
    """

    flops: float
    up: float
    down: float
    rtt: float
    memory: int | None = None
    name: str = "given"
    workers: int = 1


def profile_from(value: str | Mapping[str, object] | None) -> Profile | None:
    """The profile that a run file means: a preset (``laptop``, ``laptop+4g``), numbers, or None for no profile.

    Numbers: ``flops`` (FLOP/s), ``up_mbps``, ``down_mbps`` (Mbit/s), ``rtt_ms`` (milliseconds), ``memory_gb`` (10^9
    bytes); ``device`` and ``link`` name presets for what is not given. Without a link it is ``lan``.

    Raises:
        ConfigError: with all mistakes found.
    """
    if value is None:
        return None
    if isinstance(value, str):
        head, plus, rest = value.partition("+")
        return profile_from({"name": value, "device": head, "link": rest if plus else "lan"})
    if not isinstance(value, Mapping):
        raise ConfigError([f"a preset's name or numbers, not {value!r}"], where="profile")
    known = ", ".join(_KEYS)
    problems = [f"'{key}' is not known.{suggest(str(key), _KEYS)} Known: {known}" for key in value if key not in _KEYS]
    device, link = value.get("device"), value.get("link")
    link = "lan" if link is None else link
    presets = {
        **dict(zip(("flops", "memory_gb"), _preset(device, DEVICES, "device", problems), strict=False)),
        **dict(zip(("up_mbps", "down_mbps", "rtt_ms"), _preset(link, LINKS, "link", problems), strict=False)),
    }
    numbers: dict[str, float] = {}
    for key in ("flops", "memory_gb", "up_mbps", "down_mbps", "rtt_ms"):
        number = presets.get(key) if value.get(key) is None else value[key]
        if number is not None:
            numbers[key] = _number(number, key, problems)
    if device is None and "flops" not in numbers:
        problems.append(f"'flops' is missing: give FLOP/s, or 'device', one of: {', '.join(DEVICES)}")
    count = _whole(value.get("workers"), problems)
    if problems:
        raise ConfigError(problems, where="profile")
    return Profile(
        flops=numbers["flops"],
        up=numbers["up_mbps"] * MBIT,
        down=numbers["down_mbps"] * MBIT,
        rtt=numbers["rtt_ms"] / 1000,
        memory=round(numbers["memory_gb"] * GB) if "memory_gb" in numbers else None,
        workers=count,
        name=str(value.get("name", f"{device or 'given'}+{link}")),
    )


def _preset(
    name: object, presets: Mapping[str, tuple[float, ...]], kind: str, problems: list[str]
) -> tuple[float, ...]:
    if name is not None and str(name) not in presets:
        near = suggest(str(name), presets)
        problems.append(f"{kind} '{name}' is not known.{near} Known: {', '.join(presets)}")
    return presets.get(str(name), ())


def _whole(given: object, problems: list[str]) -> int:
    if given is None:
        return 1
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        problems.append(f"'workers' is a whole number from 1 on, not {given!r}")
        return 1
    return given


def _number(given: object, key: str, problems: list[str]) -> float:
    try:
        number = math.nan if isinstance(given, bool) else float(str(given))  # YAML reads 1e12 as a text
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        problems.append(f"'{key}' is a finite number, not {given!r}")
    elif number < 0 or (number == 0 and key != "rtt_ms"):
        problems.append(f"'{key}' must be {'0 or more' if key == 'rtt_ms' else 'more than 0'}, not {given}")
    return number
