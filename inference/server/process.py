"""A server as a process: its socket, its signals, its log."""

import asyncio
import logging
import signal
import socket
import sys

import uvicorn

from inference.server.app import create_app
from modules.errors import UserError

log = logging.getLogger("mamba_asr.server")
TICK = 0.05  # s


class Server(uvicorn.Server):
    """uvicorn's, which lets live streams say goodbye and what runs end before it goes."""

    def __init__(self, config, service, drain_seconds):
        super().__init__(config)
        self.service, self.drain_seconds = service, drain_seconds

    async def shutdown(self, sockets=None):
        self.service.drain()
        log.info("stopping; %(queue)d requests and %(streams)d streams may end", self.service.open)
        # The socket stays open: whoever comes now is told 503, and /ready says so to balancers.
        left = self.drain_seconds
        while any(self.service.open.values()) and left > 0:
            await asyncio.sleep(TICK)
            left -= TICK
        self.config.timeout_graceful_shutdown = max(left, 1)  # for answers on their way
        await super().shutdown(sockets)


def listen(host, port):
    """An open socket; UserError when the address cannot be had. Port 0: the system chooses."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port} is no port; give one up to 65535, or 0 for any")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; give others") from None
    return listening


def run(service, listening, drain_seconds):
    """Serve until SIGTERM or Ctrl-C; what runs then has `drain_seconds` to end."""
    config = uvicorn.Config(
        create_app(service),
        http="h11",
        ws="websockets-sansio",
        ws_max_size=2**20,
        access_log=False,  # of paths with what clients put into them
        log_config=None,
        timeout_graceful_shutdown=drain_seconds,
        server_header=False,
    )
    server = Server(config, service, drain_seconds)
    # uvicorn ends by raising its signal again: that is for those who do not wait.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listening])


def start_logging():
    """One line an event on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("mamba_asr.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
