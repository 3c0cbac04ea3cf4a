"""How long a connection outlives its other end; tests/cluster cuts a cable."""

from __future__ import annotations

import socket

from pipeline.parallel.silence import SILENT_S, give_up_on_silence


def test_connections_to_a_port_are_given_up_after_minutes_and_others_are_left_alone():
    with socket.create_server(("127.0.0.1", 0)) as wanted, socket.create_server(("127.0.0.1", 0)) as other:
        found = []
        for server in (wanted, other):
            with socket.create_connection(server.getsockname()) as connection:
                give_up_on_silence(wanted.getsockname()[1])
                found.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
                connection.sendall(b"still open")
        with socket.create_connection(other.getsockname()) as connection:
            give_up_on_silence()
            found.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
    assert found == [1000 * SILENT_S, 0, 1000 * SILENT_S]
