"""What there is to measure, as Prometheus reads it: nothing is counted for it, and nothing told that was not measured.

A gauge of a run goes back where the run does (to its last checkpoint); a counter is of this process and only grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from cutlayer.report.summary import peak_rss
from cutlayer.watching import STATES, House, Watch, still

Family = CounterMetricFamily | GaugeMetricFamily
Sample = tuple[Mapping[str, str], float]


class Measures(Collector):
    """Reads what there is to know, when it is asked."""

    def __init__(self, house: House) -> None:
        self.house = house

    def collect(self) -> Iterator[Any]:
        """Every family, with samples of what was measured and no others."""
        from cutlayer import __version__

        yield InfoMetricFamily("cutlayer", "The version.", value={"version": __version__})
        yield _gauge("cutlayer_process_peak_memory_bytes", "The most that the process has had.", [({}, peak_rss())])
        yield from self._server()
        yield from self._runs()
        yield from _gpus()

    def _server(self) -> Iterator[Family]:
        house, listener = self.house, self.house.listener
        yield _gauge("cutlayer_draining", "1: the server was asked to stop.", [({}, house.drain.asked())])
        if house.until is not None:
            about = "When the server's certificate ends, in seconds since 1970."
            yield _gauge("cutlayer_certificate_end_seconds", about, [({}, house.until.timestamp())])
        if listener is not None:
            yield _gauge("cutlayer_sessions", "Sessions of clients now.", [({}, len(listener.sessions))])
            reasons = still(lambda: dict(listener.reasons))
            about = "Sessions that were not let in, by reason; broken TLS handshakes are not among them."
            yield _counter("cutlayer_refused_sessions", about, [({"reason": k}, n) for k, n in reasons.items()])

    def _runs(self) -> Iterator[Family]:
        runs = list(self.house.runs)
        for name, about, read in GAUGES:
            yield _gauge(f"cutlayer_{name}", about, [({"run": run.name, **k}, v) for run in runs for k, v in read(run)])
        for name, about, read in COUNTERS:
            found = [({"run": run.name, **k}, v) for run in runs for k, v in read(run)]
            yield _counter(f"cutlayer_{name}", about, found)


def _gauge(name: str, about: str, samples: Iterable[Sample]) -> Family:
    return _filled(GaugeMetricFamily, name, about, samples)


def _counter(name: str, about: str, samples: Iterable[Sample]) -> Family:
    return _filled(CounterMetricFamily, name, about, samples)


def _filled(kind: type[Family], name: str, about: str, samples: Iterable[Sample]) -> Family:
    found = list(samples)
    family = kind(name, about, labels=list(found[0][0]) if found else [])
    for labels, value in found:
        family.add_metric(list(labels.values()), float(value))
    return family


def _state(watch: Watch) -> Iterator[Sample]:
    state = watch.state
    for name in STATES:
        yield {"state": name}, name == state


def _rounds(watch: Watch) -> Iterator[Sample]:
    if (run := watch.run) is not None:  # another thread may set it to None at any moment
        yield {}, run.counters.rounds


def _planned_rounds(watch: Watch) -> Iterator[Sample]:
    if (run := watch.run) is not None and run.config.length[0] == "rounds":
        yield {}, run.config.length[1]


def _run_steps(watch: Watch) -> Iterator[Sample]:
    if (run := watch.run) is not None:
        yield from (({"client": name}, count) for name, count in still(lambda: dict(run.counters.steps)).items())


def _run_bytes(watch: Watch) -> Iterator[Sample]:
    if (run := watch.run) is not None:
        yield from (({"step_name": name}, count) for name, count in still(lambda: dict(run.meter.by_step)).items())


def _eval_loss(watch: Watch) -> Iterator[Sample]:
    if (run := watch.run) is not None and (found := list(run.counters.evaluations)):
        yield {}, found[-1]["loss"]


def _losses(watch: Watch) -> Iterator[Sample]:
    for name, loss in still(lambda: dict(watch.losses)).items():
        if not math.isnan(loss):
            yield {"client": name}, loss


def _since_step(watch: Watch) -> Iterator[Sample]:
    if (seconds := watch.since_step) is not None:
        yield {}, seconds


def _memory(watch: Watch) -> Iterator[Sample]:
    yield from (({"what": what}, count) for what, count in watch.memory().items())


def _remotes(read: Callable[[Any], float]) -> Callable[[Watch], Iterator[Sample]]:
    """A number of each client's connection."""
    return lambda watch: (({"client": name}, read(remote)) for name, remote in watch.remotes.items())


def _client_bytes(watch: Watch) -> Iterator[Sample]:
    for name, remote in watch.remotes.items():
        received, sent = remote.frame_bytes()
        yield {"client": name, "direction": "up"}, received
        yield {"client": name, "direction": "down"}, sent


def _steps(watch: Watch) -> Iterator[Sample]:
    yield from (({"client": name}, count) for name, count in still(lambda: dict(watch.steps)).items())


def _tokens(watch: Watch) -> Iterator[Sample]:
    yield from (({"client": name}, count) for name, count in still(lambda: dict(watch.tokens)).items())


BACK = "it goes back where the run does"
HERE = "since the process began"
GAUGES: list[tuple[str, str, Callable[[Watch], Iterable[Sample]]]] = [
    ("run_state", "1 for the state that the run is in.", _state),
    ("run_rounds", f"Rounds that are done; {BACK}.", _rounds),
    ("run_planned_rounds", "Rounds that the run has, where it is made in rounds.", _planned_rounds),
    ("run_steps", f"Steps of each client that count for the result; {BACK}.", _run_steps),
    ("run_bytes", f"Bytes of frames by the pipeline's steps, as in summary.json; {BACK}.", _run_bytes),
    ("run_eval_loss", "The loss of the last evaluation.", _eval_loss),
    ("run_step_loss", "The loss of each client's last step.", _losses),
    ("run_seconds_since_step", "Seconds since a client last finished a step.", _since_step),
    ("run_memory_bytes", "Bytes at the server that are the run's own: trained, activations; not the base.", _memory),
    ("run_waiting", "Parties that wait for another, such as for the trunk.", lambda watch: [({}, len(watch.waits))]),
    ("client_connected", "1: the client is here.", _remotes(lambda remote: remote.session is not None)),
    ("client_requests", "Requests that the client has not answered yet.", _remotes(lambda remote: remote.in_flight)),
]  # fmt: skip
COUNTERS: list[tuple[str, str, Callable[[Watch], Iterable[Sample]]]] = [
    ("steps", f"Steps made {HERE}, also those that were lost and made again.", _steps),
    ("tokens", f"Tokens of these steps {HERE}.", _tokens),
    ("client_bytes", f"Bytes of frames {HERE}, with those sent again; up: to the server.", _client_bytes),
    ("client_away_seconds", f"Seconds without the client {HERE}.", _remotes(lambda remote: remote.seconds_away)),
    ("client_reconnects", f"Sessions after a client's first {HERE}.", _remotes(lambda remote: remote.reconnects)),
    ("client_retries", f"Requests that were sent again {HERE}.", _remotes(lambda remote: remote.retries)),
    ("client_dropped", f"Replies that came too late or twice {HERE}.", _remotes(lambda remote: remote.dropped)),
]  # fmt: skip


def _gpus() -> Iterator[Family]:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    found: list[Sample] = []
    for number in range(torch.cuda.device_count()):
        gpu = str(number)
        found += [
            ({"gpu": gpu, "what": "allocated"}, torch.cuda.memory_allocated(number)),
            ({"gpu": gpu, "what": "reserved"}, torch.cuda.memory_reserved(number)),
            ({"gpu": gpu, "what": "peak"}, torch.cuda.max_memory_allocated(number)),
        ]
    yield _gauge("cutlayer_gpu_memory_bytes", "What this process has of a GPU's memory.", found)
