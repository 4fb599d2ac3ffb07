"""Models are made one at a time.

While Transformers makes a model it changes its own classes (weights are not tied), ``torch.nn.init`` and PyTorch's
default type, for the whole process: of two threads that do so at once the second takes the changed for the original and
leaves it for good. A server makes the models of its runs in one thread and reads a model to hand it in another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()


@contextmanager
def making() -> Iterator[None]:
    """To be held by whoever calls ``from_pretrained``, ``from_config`` or a model's class.

    Transformers says nothing but errors in it: its table of missing keys is answered in our words.
    """
    from transformers.utils import logging as hf_logging  # slow to import

    with _LOCK:
        before = hf_logging.get_verbosity()
        hf_logging.set_verbosity_error()
        try:
            yield
        finally:
            hf_logging.set_verbosity(before)
