"""A run in a Flower federation: rounds and step 11 are Flower's, steps 3 to 9 go over our own stream.

A ServerApp calls ``train`` with any of Flower's strategies; a node's ClientApp is ``client_app()``. Both need the extra
``flower``, in an environment of its own (docs/several-machines.md).
"""

from cutlayer.flower.client import client_app
from cutlayer.flower.server import train

__all__ = ["client_app", "train"]
