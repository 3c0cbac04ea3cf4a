"""A machine that has fallen silent, as when its power or a cable fails: who asks its store gives up in minutes.

Nobody closes the connections then. The kernel repeats a question that is not acknowledged for a quarter of an hour, and
torch's key-value store waits for an answer as long as that takes: a launcher would not see that its ranks have ended,
nor a rank's watchdog that the run hangs.
"""

from __future__ import annotations

import contextlib
import os
import socket

import psutil

SILENT_S = 120
"""Patience with a store's machine; less, and a switch that starts again would end runs that live through it."""
PROBES = 4
"""Questions of the kernel's own where nothing is under way."""


def give_up_on_silence(port: int | None = None) -> None:
    """Bound the silence on this process's TCP connections to that port, on all of them for None; elsewhere than on
    Linux this does nothing. What waits on one of them fails then like on a connection that was closed."""
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        return
    options = {
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): SILENT_S // 2,
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): SILENT_S // 2 // PROBES,
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): PROBES,
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): 1000 * SILENT_S,
    }
    try:
        connections = psutil.Process().net_connections("tcp")
    except (psutil.Error, OSError):  # not to be seen here: as patient as the kernel
        return
    for found in connections:
        if found.raddr and found.fd >= 0 and port in (None, found.raddr.port):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(found.fd)) as connection:
                for name, value in options.items():
                    connection.setsockopt(*name, value)
