"""What may be claimed for the messages of a client, and what is covered by no noise on them."""

from __future__ import annotations

from cutlayer.defense import Ground, Leg

UNCOVERED = "how many texts there are, how long they are, when they are sent, the losses and token counts beside them"
FEEDBACK = (
    "the client's {part} is trained on raw texts, so that later messages carry what earlier texts did to it "
    "(empirical: no epsilon)"
)
PACKED = (
    "rows are packed (data.packing), so that one text of another length moves the texts behind it into other rows, and "
    "changes more than one of them"
)


def unfounded(ground: Ground, leg: Leg) -> str:
    """Why no epsilon holds for the messages of a step, in words; empty: one does.

    A message is a release of its own record alone only if no part on its way was trained on other records, and a
    record is a text only if each has a row of its own.
    """
    if ground.packed:
        return PACKED
    if ground.head_trained:
        return FEEDBACK.format(part="head")
    if ground.learned:
        return FEEDBACK.format(part="defense that learns")
    if leg == "send_gradients" and ground.tail_trained:
        return FEEDBACK.format(part="tail")
    if leg == "send_activations" and ground.labels_sent and ground.task == "causal":
        return "the labels, which are the text a token on, are sent as they are (two-part split)"
    return ""


def uncovered(leg: Leg, ground: Ground) -> str:
    """What noise on a step's messages does not cover, in words."""
    other = {
        "send_activations": "the labels that are sent with them" if ground.labels_sent
        else "the gradients of step 7, from which labels (of a language model: the text) can be solved",
        "send_gradients": "the activations of step 3, from which the text can be read",
    }  # fmt: skip
    return f"{other[leg]}; {UNCOVERED}"
