"""Loaded by every Python that finds this folder on its path: a connection to another machine is refused and noted."""

import ipaddress
import os
import socket
from pathlib import Path

_connect, _getaddrinfo = socket.socket.connect, socket.getaddrinfo


def _is_here(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", socket.gethostname(), "", None)


def _refuse(what):
    with Path(os.environ["NETWORK_LOG"]).open("a") as file:
        file.write(f"{what}\n")
    raise OSError(f"no network in this test: {what}")


def connect(self, address):
    """Only to this machine; a datagram socket sends nothing by it."""
    away = self.family in (socket.AF_INET, socket.AF_INET6) and not _is_here(address[0])
    if away and self.type == socket.SOCK_STREAM and address[0] not in _own():
        _refuse(address)
    return _connect(self, address)


def getaddrinfo(host, *arguments, **options):
    """Only names of this machine, and addresses."""
    name = host.decode() if isinstance(host, bytes) else host
    if not _is_here(name) and not _is_address(name):
        _refuse(name)
    return _getaddrinfo(host, *arguments, **options)


def _is_address(host):
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _own():
    return {item[4][0] for item in _getaddrinfo(socket.gethostname(), None)}


socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo
