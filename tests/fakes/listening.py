"""Where the processes of a program listen, as the kernel says."""

from __future__ import annotations

import socket

import psutil

Address = tuple[str, int]


def listening(pid: int) -> set[Address]:
    """(address, port) of every TCP socket at which a process or one of its children accepts connections, and of every
    UDP socket that is bound."""
    process = psutil.Process(pid)
    found: set[Address] = set()
    for member in (process, *process.children(recursive=True)):
        for connection in member.net_connections(kind="inet"):
            is_datagram = connection.type == socket.SOCK_DGRAM
            if connection.status == psutil.CONN_LISTEN or (is_datagram and not connection.raddr):
                found.add((connection.laddr.ip, connection.laddr.port))
    return found
