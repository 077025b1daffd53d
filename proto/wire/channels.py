# SPDX-License-Identifier: Apache-2.0
"""Addresses, and gRPC channels and servers with the limits that both ends agree on.

Plain text is for loopback and unix sockets. Off loopback a peer must prove who it is, and until credentials are
configured such an address is refused rather than served to everybody.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
import grpc.aio

MAX_MESSAGE_BYTES: Final = 4 * 2**20
MAX_CONCURRENT_RPCS: Final = 4096
KEEPALIVE_SECONDS: Final = 20
KEEPALIVE_TIMEOUT_SECONDS: Final = 10
CONNECT_SECONDS: Final = 5
# sockaddr_un has 108 bytes with the final NUL.
_MAX_UNIX_PATH_BYTES: Final = 107
_NAME: Final = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}))*\.?")


class AddressError(ValueError):
    """An address that is malformed, or that may not be used in this way; the message says what would be right."""


class BindError(OSError):
    """An address that cannot be listened on; the message says why and what to do."""


@dataclass(frozen=True)
class Address:
    """`host:port`, `[v6]:port` or `unix:path`. Exactly one of `host` and `path` is set."""

    host: str = ""
    port: int = 0
    path: Path | None = None

    @property
    def target(self) -> str:
        """As gRPC wants it."""
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach it. Names other than localhost count as remote: they can change."""
        if self.path is not None:
            return True
        if self.host.rstrip(".").lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return self.target


def parse_address(text: str) -> Address:
    """Read `host:port`, `[v6]:port` or `unix:path` (port 0 is allowed: any). Raises AddressError."""
    if text.startswith("unix:"):
        return _parse_unix(text)
    if "://" in text:
        raise AddressError(f"address {text!r} has a scheme; write host:port, [v6]:port or unix:/path")
    if text.startswith("["):
        host, bracket, port_text = text[1:].partition("]:")
        if not bracket:
            raise AddressError(f"address {text!r} does not end in ]:port; write for example [::1]:7443")
        try:
            host = str(ipaddress.IPv6Address(host))
        except ValueError:
            raise AddressError(f"address {text!r}: {host!r} is not an IPv6 address") from None
    else:
        host, colon, port_text = text.rpartition(":")
        if not colon:
            raise AddressError(f"address {text!r} has no port; write for example {text or '127.0.0.1'}:7443")
        if ":" in host:
            raise AddressError(
                f"address {text!r}: an IPv6 address is written in brackets, such as [{host}]:{port_text}"
            )
        if not _is_host(host):
            raise AddressError(f"address {text!r}: {host!r} is neither an IP address nor a host name")
    if not (port_text.isascii() and port_text.isdigit() and int(port_text[:6]) <= 65535 and len(port_text) <= 5):
        raise AddressError(f"address {text!r}: {port_text!r} is not a port (0 to 65535)")
    return Address(host=host, port=int(port_text))


def make_channel(
    address: str | Address, *, connect_backoff_max_seconds: float = 5.0, insecure_off_loopback: bool = False
) -> grpc.aio.Channel:
    """A channel to `address`. It connects on first use and reconnects by itself; every call needs its own timeout.

    Callers that must control the back-off themselves (agents) should close the channel and make a new one.
    Raises AddressError.
    """
    where = _checked(address, insecure_off_loopback, "connect to")
    if where.path is None and where.port == 0:
        raise AddressError(f"address {str(where)!r}: port 0 can be listened on, not connected to")
    return grpc.aio.insecure_channel(
        where.target,
        options=[
            *_message_options(),
            ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
            # An idle session is normal between reports; its death must still be noticed.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.initial_reconnect_backoff_ms", 200),
            # In spite of its name: how long one attempt to connect may take.
            ("grpc.min_reconnect_backoff_ms", CONNECT_SECONDS * 1000),
            ("grpc.max_reconnect_backoff_ms", int(connect_backoff_max_seconds * 1000)),
            # A proxy from the environment has no business between an agent and its controller.
            ("grpc.enable_http_proxy", 0),
            # Two channels of one process share sockets otherwise, and one's back-off becomes the other's.
            ("grpc.use_local_subchannel_pool", 1),
        ],
    )


def make_server(
    *,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    max_concurrent_rpcs: int = MAX_CONCURRENT_RPCS,
) -> grpc.aio.Server:
    """A server with the shared limits. Add services, `bind` it to addresses, then start it."""
    return grpc.aio.server(
        interceptors=list(interceptors),
        maximum_concurrent_rpcs=max_concurrent_rpcs,
        options=[
            *_message_options(),
            ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            # Clients ping every 20 s; twice that often is still no abuse.
            ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 500),
            # With it, a second daemon on the same port would silently get half of the sessions.
            ("grpc.so_reuseport", 0),
        ],
    )


def bind(server: grpc.aio.Server, address: str | Address, *, insecure_off_loopback: bool = False) -> Address:
    """Let `server` listen on `address`; returns the real address, with the port that 0 became.

    A unix socket's file is for its owner only (mode 0600); one left by a dead process is replaced, one that somebody
    answers on is not. Raises AddressError or BindError.
    """
    where = _checked(address, insecure_off_loopback, "listen on")
    if where.path is not None:
        _clear_stale_socket(where.path)
        # The socket's file appears with the umask's mode: no moment in which others could connect.
        old_umask = os.umask(0o177)
        try:
            _add_port(server, where)
        finally:
            os.umask(old_umask)
        return where
    return Address(host=where.host, port=_add_port(server, where))


def _add_port(server: grpc.aio.Server, where: Address) -> int:
    try:
        port = server.add_insecure_port(where.target)
    except RuntimeError as error:
        raise BindError(f"cannot listen on {where}: {_why_not(where, error)}") from error
    if port == 0:
        raise BindError(f"cannot listen on {where}: {_why_not(where, None)}")
    return port


def _why_not(where: Address, error: Exception | None) -> str:
    # gRPC says only that it failed; a plain bind says why.
    try:
        if where.path is not None:
            os.stat(where.path.parent)
            return f"{error}; check that the folder is writable"
        family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((where.host, where.port))
    except OSError as reason:
        return f"{reason.strerror or reason}; choose another address, or stop what uses this one"
    return f"{error or 'unknown error'}"


def _clear_stale_socket(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise BindError(f"cannot listen on unix:{path}: there is no folder {path.parent}; create it") from None
        return
    if not stat.S_ISSOCK(mode):
        raise BindError(f"cannot listen on unix:{path}: it exists and is no socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            return
        except OSError as error:
            raise BindError(f"cannot listen on unix:{path}: somebody has it ({error.strerror})") from error
    raise BindError(
        f"cannot listen on unix:{path}: another process answers on it; stop that one, or choose another path"
    )


def _checked(address: str | Address, insecure_off_loopback: bool, verb: str) -> Address:
    where = address if isinstance(address, Address) else parse_address(address)
    if not where.is_loopback and not insecure_off_loopback:
        raise AddressError(
            f"will not {verb} {where} in plain text: it is not loopback, and mutual TLS is not available yet; "
            "use 127.0.0.1, [::1] or unix:/path (through an SSH tunnel, say), or allow plain text explicitly"
        )
    return where


def _message_options() -> list[tuple[str, int]]:
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ]


def _parse_unix(text: str) -> Address:
    # unix:///path is what some tools print; unix:/path is how we write it.
    path_text = text.removeprefix("unix:")
    if path_text.startswith("//"):
        path_text = path_text[2:]
    if not path_text or "\0" in path_text:
        raise AddressError(f"address {text!r} has no path; write unix:/run/frostline/controller.sock")
    path = Path(path_text).absolute()
    length = len(os.fsencode(path))
    if length > _MAX_UNIX_PATH_BYTES:
        raise AddressError(f"address {text!r}: the path has {length} bytes, a unix socket takes {_MAX_UNIX_PATH_BYTES}")
    return Address(path=path)


def _is_host(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        # 300.1.2.3 matches the grammar of names; nobody means that.
        return _NAME.fullmatch(host) is not None and not re.fullmatch(r"[0-9.]+", host)
    return True
