# SPDX-License-Identifier: Apache-2.0
"""Shows the story: redrawn in place on a terminal, as lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from frostline.controller.cli.histogram import draw, stacked_bar
from frostline.controller.cli.screen import ASCII, UNICODE
from frostline.controller.cli.words import mode_word
from frostline.wire.units import format_size
from tests.demo.sampler import Sample, VmSample

REFRESH_PER_SECOND: Final = 4
PLAIN_SECONDS: Final = 3.0
BAR_CELLS: Final = 40


class Screen:
    """A context manager. ``source`` gives the latest sample; before there is one, nothing is drawn."""

    def __init__(self, console: Console, names: tuple[str, str], memory_bytes: tuple[int, int]) -> None:
        self.console: Final = console
        self.source: Callable[[], Sample] | None = None
        self._names: Final = names
        self._memory_bytes: Final = memory_bytes
        self._glyphs: Final = UNICODE if (console.encoding or "").lower().startswith("utf") else ASCII
        self._started: Final = time.monotonic()
        self._chapter = ""
        self._ending: Final = threading.Event()
        self._lines: threading.Thread | None = None
        self._live = Live(
            console=console,
            get_renderable=self._render,
            refresh_per_second=REFRESH_PER_SECOND,
            transient=True,
            vertical_overflow="crop",
        )

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self._live.start()
        else:
            self._lines = threading.Thread(target=self._print_lines, name="progress", daemon=True)
            self._lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        if self._lines is not None:
            self._lines.join(timeout=5)
        if self._live.is_started:
            self._live.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def chapter(self, title: str, *sentences: str) -> None:
        """A new part of the story begins; what is said here stays on the screen."""
        self._chapter = title
        self.console.print(Text(f"{self.seconds:5.0f} s  ", style="dim") + Text(title, style="bold"), soft_wrap=True)
        self.say(*sentences)

    def say(self, *sentences: str) -> None:
        for sentence in sentences:
            self.console.print(Text(" " * 9 + sentence), soft_wrap=True)

    def histogram(self, sample: VmSample) -> None:
        """The cold-age histogram as it is now, to stay on the screen."""
        if sample.vm is not None:
            for line in self._histogram(sample):
                self.console.print(Text(" " * 9) + line, no_wrap=True, crop=True)

    # --- the live picture ---

    def _render(self) -> RenderableType:
        sample = self.source() if self.source else Sample()
        if not sample.at:
            return Text()
        parts: list[RenderableType] = [
            Rule(Text(f"{self._chapter.rstrip(chr(46))}, {self.seconds:.0f} s"), style="dim")
        ]
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
        for name, memory, vm in zip(self._names, self._memory_bytes, (sample.busy, sample.quiet), strict=True):
            table.add_row(Text(name, style="bold"), self._bar(vm, memory), Text(_memory_words(vm)))
            table.add_row("", Text(_guest_words(vm), style="dim"), Text(_pager_words(vm), style="dim"))
        parts.append(table)
        if sample.busy.vm is not None and sample.busy.vm.state.HasField("histogram"):
            parts += [Text(), *self._histogram(sample.busy)]
        decision = sample.busy.vm.decision.sentence if sample.busy.vm else ""
        if decision:
            parts += [Text(), Text(f"decided: {decision}", style="italic", overflow="ellipsis", no_wrap=True)]
        return Group(*parts)

    def _bar(self, vm: VmSample, memory_bytes: int) -> Text:
        parts = [
            (vm.memfd_bytes, self._glyphs.resident, "cyan"),
            (vm.pool_bytes, self._glyphs.promotion, "yellow"),
            (max(0, vm.evicted_bytes - vm.pool_bytes), self._glyphs.evicted, "blue"),
        ]
        bar = stacked_bar(parts, memory_bytes, BAR_CELLS)
        bar.append(self._glyphs.empty * max(0, BAR_CELLS - len(bar)), style="dim")
        return bar

    def _histogram(self, sample: VmSample) -> list[Text]:
        assert sample.vm is not None
        return draw(sample.vm.state.histogram, min(self.console.width - 10, 100), self._glyphs)

    # --- lines ---

    def _print_lines(self) -> None:
        while not self._ending.wait(PLAIN_SECONDS):
            sample = self.source() if self.source else Sample()
            if sample.at:
                busy = f"{self._names[0]}: {_memory_words(sample.busy)}; {_guest_words(sample.busy)}"
                more = _pager_words(sample.busy)
                self.console.print(
                    Text(f"{self.seconds:5.0f} s    {busy}{'; ' + more if more else ''}"), soft_wrap=True
                )


def _memory_words(vm: VmSample) -> str:
    words = f"{format_size(vm.memfd_bytes)} in RAM"
    if vm.vault is not None:
        words += f", {format_size(vm.evicted_bytes)} away, pool {format_size(vm.pool_bytes)}"
    return words


def _guest_words(vm: VmSample) -> str:
    if vm.workload is None:
        return "boots"
    if vm.workload.phase == "fill":
        return f"fills: {format_size(vm.workload.filled_bytes)}"
    return f"round {vm.workload.round}, {vm.workload.checked_pages:,} pages checked, {vm.workload.errors} errors"


def _pager_words(vm: VmSample) -> str:
    if vm.vault is None:
        mode = mode_word(vm.vm.decision.mode) if vm.vm is not None else ""
        return f"not attached ({mode})" if mode else "not attached"
    vault = vm.vault
    if not vault.pager_alive:
        return "NO PAGER: faults wait for the next one"
    words = f"{vault.state.word}, {vault.why.word}, {vault.faults:,} faults"
    if vault.faults:
        p50, p99 = (vault.fault_percentile_ns(share) / 1000 for share in (500, 990))
        words += f" (p50 {p50:,.0f} us, p99 {p99:,.0f} us)"
    return words
