"""What /metrics counts, in Prometheus' text format. Each server has a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0, 15.0, 60.0)


class Metrics:
    """The counters of one server."""

    def __init__(self):
        self._registry = registry = CollectorRegistry()
        self.ready = Gauge("adastate_ready", "1 once every program is compiled", registry=registry)
        self.sessions = Counter("adastate_sessions", "sessions, by why they ended", ["reason"], registry=registry)
        self.waiting = Gauge("adastate_waiting_sessions", "sessions in the queue", registry=registry)
        self.viewers = Gauge("adastate_viewers", "open sockets", registry=registry)
        self.controls = Counter("adastate_controls", "answers to controls", ["answer"], registry=registry)
        self.network = self._histogram("network", "seconds of a chunk in the network")
        self.decoded = self._histogram("decoded", "seconds of a chunk in network and decoder")
        self.total = self._histogram("total", "seconds from a chunk's beginning to its pictures being encoded")
        self.interval = self._histogram("interval", "seconds between chunks of a running session")
        self.prompt = self._histogram("prompt", "seconds from a prompt's arrival to the first chunk that follows it")
        self.dropped = Counter("adastate_dropped_frames", "frames that slow viewers did not get", registry=registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"adastate_chunk_{name}_seconds", text, buckets=_SECONDS, registry=self._registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)
