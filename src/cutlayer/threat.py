"""Who attacks, what it sees and knows, and what it is after: the threat model that an attack declares."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from cutlayer.values import Layout

Knows = Literal["architecture", "weights", "auxiliary", "defense", "classes", "labelled"]
Target = Literal["inputs", "labels"]
WORDS = {
    "architecture": "the model's architecture",
    "weights": "the public weights of the base model",
    "auxiliary": "other text of its own",
    "defense": "the defense and its settings",
    "classes": "the classes and how often each occurs",
    "labelled": "the labels of a few samples of the run",
}
MOST_CLASSES = 64


@dataclass(frozen=True)
class Threat:
    """A threat model.

    ``reads`` are the steps whose messages it reads (names of the eleven), ``knows`` what it knows besides. ``target``:
    the ``inputs`` [B,T], or the ``labels`` [B,T] (of a causal model the next tokens). ``tail_at`` is who must hold the
    tail for it to make sense; None: anybody. ``causal``: it needs a causal language model. ``classes``: it tells the
    classes of rows with one label each apart, ``two`` or ``several``, by all that was recorded of the run; of each it
    is told the labels of ``labelled`` samples.
    """

    reads: tuple[str, ...]
    knows: tuple[Knows, ...]
    target: Target
    attacker: str = "server"
    active: bool = False
    tail_at: Literal["client", "server"] | None = None
    causal: bool = False
    classes: Literal["two", "several"] | None = None
    labelled: int = 0

    def unmet(self, layout: Layout, *, task: str, auxiliary: bool, classes: int | None = None) -> str | None:
        """Why it is none in such a run, in words; None: it is one.

        Args:
            layout: which blocks the clients hold.
            task: ``causal`` or ``classification``.
            auxiliary: whether the attacker has text of its own.
            classes: how many there are; None: rows have more than one label.
        """
        if self.causal and task != "causal":
            return "it needs a causal language model, and this run trains a classifier"
        if self.tail_at == "client" and not layout.tail_at_client:
            return "it reads the messages of a U-shaped run, and here the server holds the tail (and gets the labels)"
        if self.tail_at == "server" and layout.tail_at_client:
            return "it needs a run whose tail is at the server"
        if "auxiliary" in self.knows and not auxiliary:
            return "it needs text of the attacker's own. Give some with --aux"
        if self.classes is not None:
            return _unfit(self.classes, classes)
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


def _unfit(wanted: str, classes: int | None) -> str | None:
    """Why an attack on classes is none with so many; None: it is one."""
    if classes is None:
        return (
            "it tells classes apart, and the rows of this run have more than one label each. It needs a classifier, or "
            "completions of a single token"
        )
    if wanted == "two" and classes != 2:
        return f"it tells two classes apart, and this run has {classes}"
    if not 2 <= classes <= MOST_CLASSES:
        return f"it tells 2 to {MOST_CLASSES} classes apart, and this run has {classes}"
    return None
