# SPDX-License-Identifier: Apache-2.0
"""Addresses, and that channels and servers hold the limits they share."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from frostline.wire.channels import (
    MAX_MESSAGE_BYTES,
    Address,
    AddressError,
    BindError,
    bind,
    make_channel,
    make_server,
    parse_address,
)


@pytest.mark.parametrize(
    ("text", "target", "loopback"),
    [
        ("127.0.0.1:7443", "127.0.0.1:7443", True),
        ("127.9.9.9:1", "127.9.9.9:1", True),
        ("localhost:0", "localhost:0", True),
        ("[::1]:7443", "[::1]:7443", True),
        ("[0:0:0:0:0:0:0:1]:7443", "[::1]:7443", True),
        ("0.0.0.0:7443", "0.0.0.0:7443", False),
        ("[::]:7443", "[::]:7443", False),
        ("192.0.2.7:65535", "192.0.2.7:65535", False),
        ("controller.example:7443", "controller.example:7443", False),
        ("localhost.example:7443", "localhost.example:7443", False),
        ("unix:/run/x.sock", "unix:/run/x.sock", True),
        ("unix:///run/x.sock", "unix:/run/x.sock", True),
    ],
)
def test_addresses_are_read(text: str, target: str, loopback: bool) -> None:
    address = parse_address(text)
    assert (address.target, address.is_loopback) == (target, loopback)
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "no port"),
        ("localhost", "localhost:7443"),
        ("::1:7443", "brackets"),
        ("[::1]", "]:port"),
        ("[::g]:7443", "not an IPv6 address"),
        ("host:port", "not a port"),
        ("host:65536", "not a port"),
        ("host:-1", "not a port"),
        ("host:²", "not a port"),
        (":7443", "neither an IP address nor a host name"),
        ("300.1.2.3:7443", "neither"),
        ("a b:7443", "neither"),
        ("http://127.0.0.1:7443", "scheme"),
        ("unix:", "no path"),
        ("unix:/" + "x" * 120, "107"),
    ],
)
def test_bad_addresses_say_what_would_be_right(text: str, hint: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_address(text)
    assert hint in str(caught.value)


def test_plain_text_stays_on_this_host() -> None:
    with pytest.raises(AddressError, match="mutual TLS"):
        make_channel("192.0.2.7:7443")
    with pytest.raises(AddressError, match="port 0"):
        make_channel("127.0.0.1:0")


@pytest.fixture
async def server() -> AsyncIterator[grpc.aio.Server]:
    made = make_server()
    servicer = health.aio.HealthServicer()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, made)
    yield made
    await made.stop(None)


async def _check(channel: grpc.aio.Channel, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
    return int(answer.status)


async def test_port_zero_becomes_a_real_one(server: grpc.aio.Server) -> None:
    address = bind(server, "127.0.0.1:0")
    assert address.port > 0
    await server.start()
    async with make_channel(address) as channel:
        assert await _check(channel) == health_pb2.HealthCheckResponse.SERVING


async def test_a_unix_socket_is_its_owners(server: grpc.aio.Server, tmp_path: Path) -> None:
    address = bind(server, f"unix:{tmp_path}/s")
    await server.start()
    assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) == 0o600
    async with make_channel(address) as channel:
        assert await _check(channel) == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(BindError, match="another process answers"):
        bind(make_server(), address)


async def test_a_stale_socket_is_replaced_and_a_file_is_not(server: grpc.aio.Server, tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    bind(server, f"unix:{stale}")
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    with pytest.raises(BindError, match="no socket"):
        bind(server, f"unix:{precious}")
    assert precious.read_text() == "keep me"
    with pytest.raises(BindError, match="no folder"):
        bind(server, f"unix:{tmp_path}/nowhere/s")


async def test_two_servers_never_share_a_port(server: grpc.aio.Server) -> None:
    address = bind(server, "127.0.0.1:0")
    await server.start()
    with pytest.raises(BindError, match="in use"):
        bind(make_server(), Address(host="127.0.0.1", port=address.port))


async def test_off_loopback_is_refused(server: grpc.aio.Server) -> None:
    with pytest.raises(AddressError, match="mutual TLS"):
        bind(server, "0.0.0.0:0")
    assert bind(server, "0.0.0.0:0", insecure_off_loopback=True).port > 0


async def test_messages_above_the_limit_are_refused(server: grpc.aio.Server) -> None:
    address = bind(server, "127.0.0.1:0")
    await server.start()
    async with make_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _check(channel, "x" * (MAX_MESSAGE_BYTES + 1))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        # The channel is still good.
        assert await _check(channel) == health_pb2.HealthCheckResponse.SERVING


async def test_a_server_that_comes_back_is_found_again(tmp_path: Path) -> None:
    address = parse_address(f"unix:{tmp_path}/s")
    async with make_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _check(channel)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        late = make_server()
        servicer = health.aio.HealthServicer()
        await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, late)
        bind(late, address)
        await late.start()
        try:
            async with asyncio.timeout(10):
                await channel.channel_ready()
            assert await _check(channel) == health_pb2.HealthCheckResponse.SERVING
        finally:
            await late.stop(None)
