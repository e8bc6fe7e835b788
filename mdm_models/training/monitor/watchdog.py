"""Notices that a process of a distributed run has gone, or fallen silent: killed with its machine, frozen, or cut off.

Collectives wait for such a one for half an hour, and the thread that writes a checkpoint then keeps alive what wants to
end. Here every process holds a connection to the leading one; both send a byte over it now and then, from a thread of
their own, however long the main thread computes. Who has heard nothing for the time of patience, or finds a connection
closed without a farewell, says whose, tells the others, and ends its process, so that whoever started it can start it
again.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

from mdm_models.errors import COME_AGAIN, TrainingError
from mdm_models.processes import Processes

CONNECTING = 60.0  # seconds, at most
LOOKING_AGAIN = 0.2  # seconds from one look to the next where a process is likely to have gone
BEAT, FAREWELL, LINE_END = b".", b"!", b"\n"


@contextlib.contextmanager
def watched(processes: Processes, patience: float) -> Iterator[None]:
    """Inside the block no process waits longer than `patience` seconds for a silent one; every process must enter it.

    One that is left by an exception has gone, to the others. patience 0: nobody watches. Raises TrainingError if the
    leading process cannot be reached.
    """
    if processes.world_size == 1 or not patience:
        yield
        return
    names = processes.gather([f"rank {processes.rank} on {socket.gethostname()}"])
    with contextlib.ExitStack() as sockets:
        server = sockets.enter_context(_server()) if processes.is_main else None
        [place] = processes.gather([(_own_address(), server.getsockname()[1])] if server else [])
        try:
            peers = _accepted(server, names) if server else [_connected(place, processes.rank, names[0])]
        except OSError as error:
            raise TrainingError(f"{names[processes.rank]}: no connection with the other processes: {error}") from None
        for peer in peers:
            sockets.enter_context(peer.connection)
        watchdog = Watchdog(names[processes.rank], peers, patience)
        try:
            yield
        except RuntimeError:  # of a collective, it may be, with a process that has gone
            watchdog.look_again()
            raise
        watchdog.rest()


class Watchdog:
    """Watches other processes from a thread until `rest` is called. own: this process's name."""

    def __init__(self, own: str, peers: list["Peer"], patience: float):
        self.own, self.peers, self.patience = own, peers, patience
        self.interval = min(patience / 10, 5.0)
        self._pause = self.interval
        self._woken, self._resting = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def rest(self) -> None:
        """Stop, and have the others not miss this process."""
        self._resting = True
        self._woken.set()
        self._thread.join()
        for peer in self.peers:
            peer.send(FAREWELL)

    def look_again(self) -> None:
        """Wait for as long as it takes to find out that a process has gone, which ends this one."""
        self._pause = LOOKING_AGAIN
        self._woken.set()
        self._thread.join(2 * self.interval)

    def _watch(self) -> None:
        while True:
            self._woken.wait(self._pause)
            self._woken.clear()
            if self._resting:
                return
            for peer in self.peers:
                peer.send(BEAT)
                peer.listen()
            told = next((peer.told for peer in self.peers if peer.told), None)
            gone = [f"{peer.name} has gone" for peer in self.peers if peer.gone]
            silent = [peer.name for peer in self.peers if peer.silent_for > self.patience - 2 * self.interval]
            if told or gone or silent:
                self._end(told or ", ".join(gone) or f"{', '.join(silent)} silent for {self.patience:g} s")

    def _end(self, reason: str) -> None:
        for peer in self.peers:
            peer.send(reason.encode() + LINE_END)
        print(f"error: {reason}; {self.own} ends, and the same command goes on", file=sys.stderr, flush=True)
        os._exit(COME_AGAIN)  # at once: the main thread may be waiting for the silent one


class Peer:
    """Another process at the other end of a connection. told: what it has said of a third one; gone: it has closed the
    connection without a farewell."""

    def __init__(self, connection: socket.socket, name: str):
        connection.setblocking(False)
        self.connection, self.name, self.told, self.gone = connection, name, "", False
        self._heard, self._text, self._left = time.monotonic(), b"", False

    @property
    def silent_for(self) -> float:
        """The seconds since it was last heard; 0 for one that has said farewell."""
        return 0.0 if self._left else time.monotonic() - self._heard

    def send(self, data: bytes) -> None:
        """Send what the connection takes at once; who does not read it will be found silent."""
        with contextlib.suppress(OSError):  # who does not read it will be found silent
            self.connection.send(data)

    def listen(self) -> None:
        """Take in, without waiting, what has come: beats, a farewell, or what it says of a third one."""
        try:
            data = self.connection.recv(4096)
        except ConnectionError:
            data = b""
        except OSError:  # nothing has come, or the network is away
            return
        if data:
            self._heard = time.monotonic()
        else:
            self.gone = not self._left
        self._text += data.replace(BEAT, b"")
        self._left |= self._text.startswith(FAREWELL)
        if self._text.endswith(LINE_END):
            self.told = self._text.decode(errors="replace").strip()


def _server() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _own_address() -> str:
    """Of this machine as the others reach it: that by which it reaches the one where all of them have met."""
    meeting = os.environ["MASTER_ADDR"]
    family, *_, target = socket.getaddrinfo(meeting, int(os.environ["MASTER_PORT"]), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing
        own = probe.getsockname()[0]
    return meeting if own == target[0] else own


def _accepted(server: socket.socket, names: list[str]) -> list[Peer]:
    """The other processes, as they call in; each says its rank."""
    server.settimeout(CONNECTING)
    peers = []
    for _ in names[1:]:
        connection, _ = server.accept()
        connection.settimeout(CONNECTING)
        peers.append(Peer(connection, names[int.from_bytes(connection.recv(4))]))
    return peers


def _connected(place: tuple[str, int], rank: int, leader: str) -> Peer:
    connection = socket.create_connection(place, timeout=CONNECTING)
    connection.sendall(rank.to_bytes(4))
    return Peer(connection, leader)
