"""Who attacks, what it sees and knows, and what it is after: the threat model that an attack declares."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from cutlayer.values import Layout

Knows = Literal["architecture", "weights", "auxiliary", "defense"]
Target = Literal["inputs", "labels"]
WORDS = {
    "architecture": "the model's architecture",
    "weights": "the public weights of the base model",
    "auxiliary": "other text of its own",
    "defense": "the defense and its settings",
}


@dataclass(frozen=True)
class Threat:
    """A threat model.

    ``reads`` are the steps whose messages it reads (names of the eleven), ``knows`` what it knows besides. ``target``:
    the ``inputs`` [B,T], or the ``labels`` [B,T] (of a causal model the next tokens). ``tail_at`` is who must hold the
    tail for it to make sense; None: anybody. ``causal``: it needs a causal language model.
    """

    reads: tuple[str, ...]
    knows: tuple[Knows, ...]
    target: Target
    attacker: str = "server"
    active: bool = False
    tail_at: Literal["client", "server"] | None = None
    causal: bool = False

    def unmet(self, layout: Layout, *, task: str, auxiliary: bool) -> str | None:
        """Why it is none in such a run, in words; None: it is one."""
        if self.causal and task != "causal":
            return "it needs a causal language model, and this run trains a classifier"
        if self.tail_at == "client" and not layout.tail_at_client:
            return "it reads the messages of a U-shaped run, and here the server holds the tail (and gets the labels)"
        if self.tail_at == "server" and layout.tail_at_client:
            return "it needs a run whose tail is at the server"
        if "auxiliary" in self.knows and not auxiliary:
            return "it needs text of the attacker's own. Give some with --aux"
        return None

    def told(self) -> dict[str, Any]:
        """As ``audit.json`` has it."""
        found = asdict(self)
        return {**found, "reads": list(self.reads), "knows": list(self.knows)}

    def words(self) -> str:
        """In a sentence, for people."""
        what = ", ".join(WORDS[one] for one in self.knows) or "nothing else"
        steps = ", ".join(step.replace("_", " ") for step in self.reads)
        how = "An active" if self.active else "A passive"
        return f"{how} {self.attacker} that reads {steps}, knows {what}, and is after the {self.target}."
