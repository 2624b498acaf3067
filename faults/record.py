"""A pytest plugin: a JSON line in the file FAULTS_TESTS for every test that has ended."""

import json
import os
from pathlib import Path

import pytest

from moejax.events import append_line


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call" or (report.when == "setup" and not report.passed):
        why = str(report.longrepr)[-300:] if report.failed else ""
        line = {"test": item.nodeid, "outcome": report.outcome, "why": why}
        append_line(Path(os.environ["FAULTS_TESTS"]), json.dumps(line))
