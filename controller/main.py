# SPDX-License-Identifier: Apache-2.0
"""frostline-controller: flags, logs, signals, and the exit status."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
from pydantic import ValidationError

from frostline.controller.config import Settings
from frostline.controller.service import Controller
from frostline.controller.state.private import PrivateRedisError
from frostline.wire.channels import AddressError
from frostline.wire.logs import configure_logs
from frostline.wire.telemetry import Telemetry, configure

_log = structlog.get_logger("frostline.controller")

EXIT_FAILED = 1
EXIT_USAGE = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _from_environment(name: str) -> str:
    return f" [env: FROSTLINE_CONTROLLER_{name}]"


_SECONDS = "SECONDS"


@app.command()
def run(
    listen: Annotated[
        str | None, typer.Option(help="host:port or unix:/path; loopback only." + _from_environment("LISTEN"))
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(help="Redis to use; without it a private one is started." + _from_environment("REDIS_URL")),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="For the private Redis." + _from_environment("DATA_DIR"))
    ] = None,
    metrics_listen: Annotated[
        str | None,
        typer.Option(help="host:port for Prometheus, port 0: any, '': none." + _from_environment("METRICS_LISTEN")),
    ] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="OTLP gRPC receiver for traces." + _from_environment("OTLP_ENDPOINT"))
    ] = None,
    trace_console: Annotated[
        bool | None,
        typer.Option("--trace-console", help="Spans as lines on stderr." + _from_environment("TRACE_CONSOLE")),
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(help="json, console or auto." + _from_environment("LOG_FORMAT"))
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error." + _from_environment("LOG_LEVEL"))
    ] = None,
    heartbeat_seconds: Annotated[
        float | None, typer.Option(metavar=_SECONDS, help="Asked of agents; suspect after four missed. Default 10.")
    ] = None,
    report_seconds: Annotated[
        float | None, typer.Option(metavar=_SECONDS, help="Asked of agents: between reports. Default 60.")
    ] = None,
    lease_seconds: Annotated[
        float | None, typer.Option(metavar=_SECONDS, help="Of budgets, renewed at a third of it. Default 180.")
    ] = None,
    decide_seconds: Annotated[
        float | None, typer.Option(metavar=_SECONDS, help="Longest time between two decisions for a host. Default 5.")
    ] = None,
    ack_seconds: Annotated[
        float | None, typer.Option(metavar=_SECONDS, help="For an agent to answer a budget set. Default 15.")
    ] = None,
    streams_per_second: Annotated[
        float | None, typer.Option(metavar="COUNT", help="New sessions that are admitted. Default 50.")
    ] = None,
) -> None:
    """Decides what each VM of a fleet may have away from its host's memory.

    Ends on SIGTERM or SIGINT. Exit status: 0 ended as asked, 1 could not start, 2 wrong configuration.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    sys.exit(_main(given))


def _main(given: dict[str, Any]) -> int:
    try:
        settings = Settings(**given)
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_context=False):
            name = ".".join(str(part) for part in problem["loc"]) or "configuration"
            sys.stderr.write(f"frostline-controller: {name}: {problem['msg'].removeprefix('Value error, ')}\n")
        return EXIT_USAGE
    configure_logs(settings.log_format, settings.log_level)
    try:
        telemetry = configure(
            "frostline-controller",
            otlp_endpoint=settings.otlp_endpoint or None,
            console=settings.trace_console,
            metrics_listen=settings.metrics_listen or None,
        )
    except (AddressError, OSError) as error:
        _log.error("cannot start", why=str(error))
        return EXIT_FAILED
    if telemetry.metrics_address is not None:
        _log.info("metrics", url=f"http://{telemetry.metrics_address}/metrics")
    try:
        return asyncio.run(_serve(settings, telemetry))
    finally:
        telemetry.shutdown()


async def _serve(settings: Settings, telemetry: Telemetry) -> int:
    asked_to_end = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_end.set)
    controller = Controller(settings, telemetry)
    try:
        await controller.start()
    except (PrivateRedisError, AddressError, OSError) as error:
        _log.error("cannot start", why=str(error))
        return EXIT_FAILED
    await asked_to_end.wait()
    # A second signal must not interrupt the orderly end; it is bounded anyway.
    _log.info("stopping")
    await controller.stop()
    _log.info("stopped")
    return 0


def main() -> None:
    """Entry point of frostline-controller."""
    app()


if __name__ == "__main__":
    main()
