# SPDX-License-Identifier: Apache-2.0
"""Reports a run to people and to CI: a line for each row that ends, and a JUnit file with a suite for each row."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from vagrant.matrix import guest
from vagrant.matrix.verdict import LOST, PASSED, Verdict, read_junit

SHOWN = 12
"""The number of complaints on the terminal. All complaints are in verdict.json and in the JUnit file."""


class Progress:
    """Prints lines to stderr, each with the seconds since the run began; several rows may do so at once."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """Prints one line without interruption."""
        with self._lock:
            sys.stderr.write(f"[{time.monotonic() - self._began:4.0f} s] {text}\n")
            sys.stderr.flush()

    def verdict(self, found: Verdict, folder: Path) -> None:
        """Prints the line of a row that has ended, its complaints, and the end of the console if the guest was lost."""
        lines = [found.line, *(f"    {complaint}" for complaint in found.complaints[:SHOWN])]
        if len(found.complaints) > SHOWN:
            lines.append(f"    ... and {len(found.complaints) - SHOWN} more in {folder / 'verdict.json'}")
        if found.state == LOST and (folder / "console.log").exists():
            lines += [f"    | {line}" for line in guest.console_tail(folder).splitlines()]
        self.say("\n".join(lines))


def write_junit(verdicts: Iterable[Verdict], results: Path) -> Path:
    """One testsuite for each row: its tests, and a test case "row" for failures of the row as a whole.

    A lost guest is an <error>, a failed row a <failure>, which CI systems show differently.
    """
    top = ElementTree.Element("testsuites")
    for found in verdicts:
        suite = ElementTree.SubElement(top, "testsuite", name=found.row, time=f"{found.seconds:.1f}")
        whole = ElementTree.SubElement(suite, "testcase", classname=found.row, name="row", time=f"{found.seconds:.1f}")
        if found.state != PASSED:
            kind = "error" if found.state == LOST else "failure"
            problem = ElementTree.SubElement(whole, kind, message=f"{found.state}: {len(found.complaints)} complaints")
            problem.text = _printable("\n".join(found.complaints))
        for report in sorted((results / found.row / "results").glob("junit*.xml")):
            for test in read_junit(report):
                case = ElementTree.SubElement(suite, "testcase", classname=found.row, name=test.name)
                if test.outcome != "passed":
                    kind = "failure" if test.outcome == "failed" else "skipped"
                    ElementTree.SubElement(case, kind, message=_printable(test.reason))
    path = results / "junit.xml"
    ElementTree.ElementTree(top).write(path, encoding="utf-8", xml_declaration=True)
    return path


def _printable(text: str) -> str:
    """XML 1.0 allows no control characters but tab and line ends."""
    return "".join(char for char in text if char in "\t\n" or ord(char) >= 32)
