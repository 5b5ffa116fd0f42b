"""Runs at the start of every child process of the suite (its folder is on PYTHONPATH).

A page must work offline: any connection but the loopback raises. And the shapes in the package's
annotations are checked in notebooks as they are in the tests.
"""

import ipaddress
import os
import socket

_connect, _connect_ex = socket.socket.connect, socket.socket.connect_ex
_getaddrinfo = socket.getaddrinfo


def _is_loopback(host):
    try:
        return host in (None, "", "localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _to_loopback(connect):
    def connect_to_loopback(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
            raise ConnectionRefusedError(f"the test suite allows no connection to {address}")
        return connect(self, address)

    return connect_to_loopback


def _look_up_loopback(host, *arguments, **keywords):
    if not _is_loopback(host):
        raise socket.gaierror(f"the test suite looks up no foreign name: {host}")
    return _getaddrinfo(host, *arguments, **keywords)


socket.socket.connect = _to_loopback(_connect)
socket.socket.connect_ex = _to_loopback(_connect_ex)
socket.getaddrinfo = _look_up_loopback

if os.environ.get("CLN_TUTORIAL_CHECK_SHAPES", "1") == "1":
    try:
        import jaxtyping
    except ImportError:  # a child environment that has nothing of ours yet
        pass
    else:
        jaxtyping.install_import_hook("cln_tutorial", "beartype.beartype")
