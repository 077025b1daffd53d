# SPDX-License-Identifier: Apache-2.0
"""The commands: run and standalone are the daemon, probe looks, the rest asks a running agent."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console

from frostline.agent.admin import AdminError, AdminRequest, ask
from frostline.agent.cli.exits import EPILOG, FROM_ADMIN, Exit
from frostline.agent.cli.output import print_probe, print_status
from frostline.agent.settings import ENVIRONMENT_PREFIX, AgentSettings

app = typer.Typer(
    help="Finds the VMs of this host, keeps a pager at each, reports, and applies budgets. Every option can also be "
    f"given in the environment: {ENVIRONMENT_PREFIX}RUN_DIR and so on.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

NodeId = Annotated[str | None, typer.Option(help="Name of this host in the fleet. Default: its host name.")]
RunDirOption = Annotated[
    Path | None, typer.Option(help="Sockets, pagers' logs, lock; one agent for each. Default: /run/frostline.")
]
StateDir = Annotated[Path | None, typer.Option(help="Where the epoch fence is kept. Default: the run folder.")]
LimitsFile = Annotated[
    Path | None, typer.Option(help="Local limits file. Default: /etc/frostline/limits.yaml if it is there.")
]
PagerProgram = Annotated[Path | None, typer.Option(help="frostline-pager to start. Default: the installed one.")]
PagerLog = Annotated[str | None, typer.Option(help="Where pagers log to: file (in the run folder) or stderr.")]
Trackers = Annotated[
    str | None,
    typer.Option(
        help="Trackers in order of preference, such as rwp,zap, or auto. Default: the limits file's, else auto."
    ),
]
DiscoveryInterval = Annotated[
    str | None, typer.Option(help="Time between looks for VMs, statuses and records. Default: 2s.")
]
ReportInterval = Annotated[
    str | None, typer.Option(help="Time between reports. Default: what the controller says (standalone: 10s).")
]
AttachGrace = Annotated[
    str | None, typer.Option(help="How long a new VM waits for the policy's word before it is observed. Default: 15s.")
]
DrainAfter = Annotated[
    str | None, typer.Option(help="Without a controller for this long, pages come back if RAM allows. Default: 1h.")
]
DetachOnExit = Annotated[
    bool | None, typer.Option("--detach-on-exit", help="On SIGTERM bring everything back and detach all VMs.")
]
DetachTimeout = Annotated[str | None, typer.Option(help="How long --detach-on-exit may take. Default: 5m.")]
MetricsListen = Annotated[
    str | None, typer.Option(help="Prometheus endpoint; empty for none. Default: 127.0.0.1:9465.")
]
OtlpEndpoint = Annotated[str | None, typer.Option(help="OTLP gRPC receiver for traces. Default: none.")]
TraceConsole = Annotated[bool | None, typer.Option("--trace-console", help="Write each span as a line to stderr.")]
LogFormat = Annotated[str | None, typer.Option(help="json, console or auto (console on a terminal). Default: auto.")]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error. Default: info.")]
Insecure = Annotated[
    bool | None, typer.Option("--insecure-off-loopback", help="Allow plain text to other hosts. Not for production.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON for programs.")]
VmArgument = Annotated[str, typer.Argument(help="Id, UUID, name or pid of the VM.")]


@app.command(epilog=EPILOG)
def run(
    controller: Annotated[str | None, typer.Option(help="Address of the controller: host:port or unix:/path.")] = None,
    node_id: NodeId = None,
    run_dir: RunDirOption = None,
    state_dir: StateDir = None,
    limits: LimitsFile = None,
    pager: PagerProgram = None,
    pager_log: PagerLog = None,
    trackers: Trackers = None,
    discovery_interval: DiscoveryInterval = None,
    report_interval: ReportInterval = None,
    attach_grace: AttachGrace = None,
    drain_after: DrainAfter = None,
    detach_on_exit: DetachOnExit = None,
    detach_timeout: DetachTimeout = None,
    metrics_listen: MetricsListen = None,
    otlp_endpoint: OtlpEndpoint = None,
    trace_console: TraceConsole = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
    insecure_off_loopback: Insecure = None,
) -> None:
    """Run with a controller. SIGTERM: the agent leaves, pagers stay and serve. SIGHUP: read the limits file again."""
    settings = _settings(locals())
    if not settings.controller:
        _fail(
            Exit.USAGE, f"run needs --controller ADDRESS or {ENVIRONMENT_PREFIX}CONTROLLER; without one use standalone"
        )
    _daemon(settings.model_copy(update={"policy": None}))


@app.command(epilog=EPILOG)
def standalone(
    policy: Annotated[Path | None, typer.Option(help="The policy file, in the controller's format.")] = None,
    node_id: NodeId = None,
    run_dir: RunDirOption = None,
    state_dir: StateDir = None,
    limits: LimitsFile = None,
    pager: PagerProgram = None,
    pager_log: PagerLog = None,
    trackers: Trackers = None,
    discovery_interval: DiscoveryInterval = None,
    report_interval: ReportInterval = None,
    detach_on_exit: DetachOnExit = None,
    detach_timeout: DetachTimeout = None,
    metrics_listen: MetricsListen = None,
    otlp_endpoint: OtlpEndpoint = None,
    trace_console: TraceConsole = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
    insecure_off_loopback: Insecure = None,
) -> None:
    """Run without a controller, by a local policy file. SIGHUP: read policy and limits again."""
    settings = _settings(locals())
    if settings.policy is None:
        _fail(Exit.USAGE, f"standalone needs --policy FILE or {ENVIRONMENT_PREFIX}POLICY")
    _daemon(settings.model_copy(update={"controller": ""}))


@app.command(epilog=EPILOG)
def probe(
    run_dir: RunDirOption = None,
    limits: Annotated[
        Path | None, typer.Option(help="What if: this limits file. Default: as the running agent.")
    ] = None,
    trackers: Annotated[
        str | None, typer.Option(help="What if: these trackers. Default: as the running agent.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what this kernel and each VMM allow, what is chosen, why, and what else could be. Changes nothing."""
    from frostline.agent.limits import LimitsError
    from frostline.agent.probe import probe as look
    from frostline.agent.wanted import wanted_here

    settings = _settings({"run_dir": run_dir, "limits": limits, "trackers": trackers})
    given = {"trackers_given": trackers is not None, "limits_given": limits is not None}
    try:
        found = look(asyncio.run(wanted_here(settings, **given)))
    except LimitsError as error:
        _fail(Exit.USAGE, str(error))
    except OSError as error:
        _fail(Exit.FAILED, f"{error}; probe needs root")
    if as_json:
        _print_json(found.document())
    else:
        print_probe(found, Console())
    if not found.able:
        _fail(Exit.UNABLE, "this kernel cannot serve any VM: a feature that is needed is not there (see above)")


@app.command(epilog=EPILOG)
def status(run_dir: RunDirOption = None, as_json: AsJson = False) -> None:
    """Show the running agent and its VMs."""
    answer = _ask(run_dir, AdminRequest(method="status"))
    if as_json:
        _print_json({key: value for key, value in answer.items() if key != "ok"})
    else:
        print_status(answer, Console())


@app.command(epilog=EPILOG)
def vms(run_dir: RunDirOption = None, as_json: AsJson = False) -> None:
    """Show this host's VMs; with --json only the list."""
    answer = _ask(run_dir, AdminRequest(method="status"))
    if as_json:
        _print_json(answer["vms"])
    else:
        print_status(answer, Console())


@app.command(epilog=EPILOG)
def drain(
    vm: VmArgument,
    run_dir: RunDirOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when nothing is away any more.")] = False,
    timeout: Annotated[str, typer.Option(help="With --wait: give up after this long.")] = "5m",
    as_json: AsJson = False,
) -> None:
    """Bring everything of a VM back and keep it in RAM until `resume`, whatever the policy says. It stays attached."""
    answer = _ask(run_dir, AdminRequest(method="drain", vm=vm))
    if wait and not _problems(answer):
        _wait(run_dir, vm, timeout, lambda found: not (found["pager"] and found["pager"]["evicted_pages"]))
    _finish(answer, "draining" if not wait else "nothing is away any more", as_json)


@app.command(epilog=EPILOG)
def detach(
    vm: VmArgument,
    run_dir: RunDirOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the VM is detached.")] = False,
    timeout: Annotated[str, typer.Option(help="With --wait: give up after this long.")] = "5m",
    as_json: AsJson = False,
) -> None:
    """Drain a VM, detach from it, and stay away until `resume`, whatever the policy says."""
    answer = _ask(run_dir, AdminRequest(method="detach", vm=vm))
    if wait:
        _wait(run_dir, vm, timeout, lambda found: found["phase"] in ("idle", "refused"))
    _finish(answer, "detaching" if not wait else "detached", as_json)


@app.command(epilog=EPILOG)
def resume(vm: VmArgument, run_dir: RunDirOption = None, as_json: AsJson = False) -> None:
    """Take back a `drain` or `detach`: the policy decides on this VM again."""
    _finish(_ask(run_dir, AdminRequest(method="resume", vm=vm)), "in the policy's hands", as_json)


@app.command(epilog=EPILOG)
def release(
    vm: Annotated[str, typer.Argument(help="Id, UUID, name or pid of the VM. Default: all.")] = "",
    run_dir: RunDirOption = None,
    as_json: AsJson = False,
) -> None:
    """Let pagers end in good order; the next ones, of the program as now installed, take over at once (upgrade)."""
    _finish(_ask(run_dir, AdminRequest(method="release", vm=vm)), "released; the next pager takes over", as_json)


def _settings(given: dict[str, Any]) -> AgentSettings:
    """What was given on the command line goes before the environment."""
    try:
        return AgentSettings(**{key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        lines = [
            f"{'--' + str(item['loc'][0]).replace('_', '-')}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_url=False, include_context=False)
        ]
        _fail(Exit.USAGE, "; ".join(lines))


def _daemon(settings: AgentSettings) -> None:
    """Run the agent until it is told to stop."""
    from frostline.agent.agent import Agent
    from frostline.agent.limits import LimitsError
    from frostline.agent.rundir import RunDir, RunDirError
    from frostline.agent.standalone import PolicyError
    from frostline.wire.channels import AddressError, parse_address
    from frostline.wire.logs import configure_logs
    from frostline.wire.telemetry import configure

    configure_logs(settings.log_format, settings.log_level)
    try:
        if settings.controller:
            address = parse_address(settings.controller)
            if not (address.is_loopback or settings.insecure_off_loopback):
                raise AddressError(
                    f"--controller {address} is another host, and mutual TLS is not available yet: use a tunnel to "
                    "loopback, or allow plain text with --insecure-off-loopback"
                )
        run_dir = RunDir(settings.run_dir)
    except AddressError as error:
        _fail(Exit.USAGE, str(error))
    except RunDirError as error:
        _fail(Exit.BUSY if isinstance(error.__cause__, BlockingIOError) else Exit.FAILED, error.args[1])
    try:
        telemetry = configure(
            "frostline-agent",
            otlp_endpoint=settings.otlp_endpoint or None,
            console=settings.trace_console,
            metrics_listen=settings.metrics_listen or None,
            resource={"host.name": settings.node_id},
            insecure_off_loopback=settings.insecure_off_loopback,
        )
    except (AddressError, OSError) as error:
        _fail(Exit.USAGE if isinstance(error, AddressError) else Exit.FAILED, str(error))

    async def serve() -> None:
        agent = Agent(settings, telemetry, run_dir)
        await agent.run()

    try:
        asyncio.run(serve())
    except (LimitsError, PolicyError) as error:
        _fail(Exit.USAGE, str(error))
    except OSError as error:
        _fail(Exit.FAILED, str(error))
    finally:
        telemetry.shutdown()
        run_dir.close()


def _ask(run_dir: Path | None, request: AdminRequest) -> dict[str, Any]:
    settings = _settings({"run_dir": run_dir})
    try:
        return asyncio.run(ask(settings.admin_path, request))
    except AdminError as error:
        _fail(FROM_ADMIN.get(error.code, Exit.FAILED), str(error))


def _wait(run_dir: Path | None, vm: str, timeout: str, done: Any) -> None:
    from frostline.wire.units import UnitError, parse_duration

    try:
        deadline = time.monotonic() + parse_duration(timeout)
    except UnitError as error:
        _fail(Exit.USAGE, f"--timeout: {error}")
    while time.monotonic() < deadline:
        answer = _ask(run_dir, AdminRequest(method="status"))
        found = [each for each in answer["vms"] if vm in (each["vm_id"], each["uuid"], each["name"], str(each["pid"]))]
        if all(done(each) for each in found):
            return
        time.sleep(0.2)
    _fail(Exit.FAILED, f"{vm} is not done after {timeout}; it goes on in the background")


def _problems(answer: dict[str, Any]) -> list[str]:
    return [f"{each['name']}: {each['problem']}" for each in answer["vms"] if each["problem"]]


def _finish(answer: dict[str, Any], word: str, as_json: bool) -> None:
    problems = _problems(answer)
    if as_json:
        _print_json({"vms": answer["vms"]})
    else:
        for each in answer["vms"]:
            if not each["problem"]:
                typer.echo(f"{each['name']}: {word}")
        if not answer["vms"]:
            typer.echo("no VM is served")
    if problems:
        _fail(Exit.FAILED, "; ".join(problems))


def _print_json(document: object) -> None:
    json.dump(document, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


def _fail(code: Exit, message: str) -> NoReturn:
    typer.echo(f"frostline-agent: {message}", err=True)
    raise typer.Exit(int(code))
