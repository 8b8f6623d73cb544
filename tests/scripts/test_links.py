"""Emulated links: what a wire does, in numbers; and, where network namespaces can be made, real TCP over them."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from scripts.bench.links.namespace import LinksError, Namespace
from scripts.bench.links.network import Network
from scripts.bench.links.tun import INTERFACE
from scripts.bench.links.wire import VNET_HEADER, Wire, destination, wire_bytes
from subnet.transport.shaping import Link

MBIT = 1e6
PORT = 5000


def tcp_packet(payload: int, *, segment: int = 0, options: int = 12) -> bytes:
    """IPv4 and TCP headers of a real layout; of TCP's only the length matters here."""
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40 + options + payload, 0, 0, 64, 6, 0, bytes(4), b"\x0a\x49\x00\x02")
    tcp = bytes(12) + bytes([(20 + options) // 4 << 4]) + bytes(7 + options)
    return VNET_HEADER.pack(1, 1 if segment else 0, 54, segment, 20, 16) + ip + tcp + bytes(payload)


@pytest.mark.parametrize(
    ("payload", "segment", "expected"),
    [
        (0, 0, 52),
        (1448, 0, 1500),
        (1448, 1448, 1500),
        (1449, 1448, 1501 + 52),
        (43 * 1448, 1448, 43 * 1500),
    ],
)
def test_a_large_segment_counts_as_the_packets_it_stands_for(payload: int, segment: int, expected: int) -> None:
    packet = tcp_packet(payload, segment=segment)
    assert wire_bytes(packet, len(packet)) == expected


def test_the_destination_is_read_from_ipv4_only() -> None:
    packet = tcp_packet(10)
    assert destination(packet, len(packet)) == b"\x0a\x49\x00\x02"
    other = packet[: VNET_HEADER.size] + b"\x60" + packet[VNET_HEADER.size + 1 :]
    assert destination(other, len(other)) is None
    assert destination(packet, VNET_HEADER.size + 19) is None


def test_a_wire_delays_paces_and_drops() -> None:
    wire = Wire(bandwidth_bps=8 * MBIT, latency_s=0.05, queue_s=0.0105)  # 1 MB/s: ten wait and one passes
    arrivals = [wire.send(1000, 5.0) for _ in range(13)]
    assert arrivals[:11] == pytest.approx([5.051 + 0.001 * place for place in range(11)])
    assert arrivals[11:] == [None, None]
    assert wire.dropped == 2
    assert wire.send(1000, 5.001) == pytest.approx(5.062)
    assert wire.send(1000, 6.0) == pytest.approx(6.051)  # an idle wire owes nothing
    assert wire.carried == 13_000


def test_a_random_loss_is_not_pretended() -> None:
    with pytest.raises(LinksError, match=r"0\.500%"):
        Network(2, Link(loss=0.005))


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        made = Network(3, Link(latency_s=0.05, up_bps=200 * MBIT))
    except LinksError as error:
        pytest.skip(str(error))
    with made:
        yield made


def listen(network: Network, node: int) -> socket.socket:
    return network.call(node, lambda: socket.create_server((network.hosts[node], PORT)))


def connect(network: Network, node: int, to: int) -> socket.socket:
    return network.call(node, lambda: socket.create_connection((network.hosts[to], PORT), timeout=20))


def test_a_small_message_takes_twice_the_latency(network: Network) -> None:
    with listen(network, 1) as server, connect(network, 0, 1) as client:
        far, _ = server.accept()

        def echo() -> None:
            while said := far.recv(100):
                far.sendall(said)

        thread = threading.Thread(target=echo)
        thread.start()
        trips = []
        for _ in range(5):
            start = time.monotonic()
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
            trips.append(time.monotonic() - start)
        client.shutdown(socket.SHUT_WR)
        thread.join()
        far.close()
    assert 0.1 <= min(trips) < 0.12


def test_a_bulk_transfer_fills_its_link_and_leaves_the_others_alone(network: Network) -> None:
    """Two transfers out of one node, each at its own link's pace: 200 Mbit/s less 52 of 1,500 bytes of headers."""
    seconds, warm = 4.0, 1.5
    rates: dict[int, float] = {}

    def receive(server: socket.socket, node: int) -> None:
        far, _ = server.accept()
        buffer, total, marks = bytearray(1 << 20), 0, []
        with far:
            while size := far.recv_into(buffer):
                total += size
                marks.append((time.monotonic(), total))
        first = next(mark for mark in marks if mark[0] > marks[0][0] + warm)
        rates[node] = 8 * (marks[-1][1] - first[1]) / (marks[-1][0] - first[0])

    def send(client: socket.socket) -> None:
        end, data = time.monotonic() + seconds, bytes(1 << 20)
        with client:
            while time.monotonic() < end:
                client.sendall(data)

    servers = {node: listen(network, node) for node in (1, 2)}
    threads = [threading.Thread(target=receive, args=(server, node)) for node, server in servers.items()]
    threads += [threading.Thread(target=send, args=(connect(network, 0, node),)) for node in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for server in servers.values():
        server.close()
    for rate in rates.values():
        assert 0.9 * 200 * MBIT <= rate <= 200 * MBIT * 1448 / 1500 * 1.01
    network.close()
    assert network.passed is not None
    assert network.passed.carried > 2 * 200 * MBIT / 8 * (seconds - warm)


def test_processes_live_on_their_node_and_nothing_stays(network: Network) -> None:
    listing = "import socket; print(sorted(name for _, name in socket.if_nameindex()))"
    command = [*network.enter(2), sys.executable, "-c", listing]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(sorted(["lo", INTERFACE]))
    assert INTERFACE not in {name for _, name in socket.if_nameindex()}


def test_a_namespace_returns_what_is_raised_inside() -> None:
    try:
        space = Namespace()
    except LinksError as error:
        pytest.skip(str(error))
    with space, pytest.raises(ZeroDivisionError):
        space.call(lambda: 1 // 0)
