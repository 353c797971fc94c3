"""Numbers for Prometheus; none of them tells what was said."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FACTORS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
SECONDS = (0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """One server's own registry, so that several live in one process."""

    def __init__(self):
        self.registry = CollectorRegistry()

        def make(kind, name, text, **more):
            return kind(f"mamba_asr_{name}", text, registry=self.registry, **more)

        self.requests = make(
            Counter, "requests", "Transcription requests answered", labelnames=["status"]
        )
        self.request_seconds = make(
            Histogram, "request_seconds", "From a request's arrival to its answer", buckets=SECONDS
        )
        self.audio_seconds = make(
            Counter, "audio_seconds", "Seconds of audio transcribed", labelnames=["source"]
        )
        self.compute_seconds = make(
            Counter, "compute_seconds", "Seconds that the model computed", labelnames=["source"]
        )
        for source in ("file", "stream"):
            self.audio_seconds.labels(source)
            self.compute_seconds.labels(source)
        self.real_time_factor = make(
            Histogram,
            "real_time_factor",
            "Seconds from a recording's arrival to its text, of a second of its audio",
            buckets=FACTORS,
        )
        self.batch = make(
            Histogram,
            "batch_windows",
            "Windows computed together",
            buckets=(1, 2, 4, 8, 16, 32, 64),
        )
        self.queue = make(Gauge, "queue", "Requests received, waiting or computed now")
        self.waiting = make(Gauge, "waiting_windows", "Windows of audio that wait for the model")
        self.streams = make(Gauge, "streams", "Live streams open now")
        self.ready = make(Gauge, "ready", "1 when the model is warm and the server takes requests")

    def text(self):
        return generate_latest(self.registry)
