"""A pytest plugin that keeps the suite quick: no test file may take over a minute, but those that say why.

It knows only how long tests took. A file that takes longer is named, and fails the run in continuous integration.
"""

import os
from collections import Counter
from collections.abc import Iterable

import pytest

#: Seconds, of setup, tests and teardown together, on two CPU cores that nothing else uses.
LIMIT_S = 60.0
#: Of the whole run. On a slow machine every file takes longer: one is too slow that takes more of the run than this.
LIMIT_SHARE = LIMIT_S / (2 * 12 * 60)
#: Files that may take longer, and why.
SLOW = {
    "tests/test_burst.py": "four bursts on the whole app, each from no replica and back",
    "tests/test_audit_serve.py": "real jobs of Ray, each an interpreter that loads the application",
    "tests/test_rolling_upgrade.py": "a cluster of its own, each of whose nodes drains for real",
    "tests/test_serve_app.py": "the whole app, killed in its middle; 400 edits",
    "tests/test_launcher.py": "real jobs of Ray, and the app deployed again",
    "tests/test_lora_serve.py": "200 jobs on the whole app, and two replicas that load torch",
    "tests/test_engine_compiled.py": "torch.compile",
    "tests/test_audit_compiling.py": "torch.compile",
    "tests/test_variant_loras.py": "torch.compile; the real pipeline at each packing, and diffusers' own beside it",
    "tests/test_engine_cuda.py": "torch.compile, on a GPU",
    "tests/test_audit_page.py": "a real browser",
    "tests/test_workbench.py": "a real browser",
    "tests/test_workbench_tabs.py": "a real browser, and a tiny pipeline",
    "tests/test_message_sources.py": "a broker's real leases and delays",
    "tests/test_engine_exact.py": "the real pipeline at each packing and number type",
    "tests/test_benchmark_engine.py": "the benchmark's comparisons, painted for real",
    "tests/test_loras.py": "a LoRA is looked at in a process of its own, which loads torch",
    "tests/test_lora_stores.py": "real pipelines with tiny weights, over four servers",
    "tests/test_openai_client.py": "the package's own retries and time limits, also on Serve",
    "tests/test_generate_serve.py": "the whole app; each command of a document is a process",
    "tests/test_studio_loras.py": "real pipelines, with tiny weights",
}

TIMES = pytest.StashKey[Counter[str]]()


def too_slow(times: Counter[str], limit_s: float = LIMIT_S) -> list[str]:
    """Of files with their seconds: those that take too long, the slowest first."""
    limit_s = max(limit_s, LIMIT_SHARE * times.total())
    return [name for name, seconds in times.most_common() if seconds > limit_s and name not in SLOW]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--file-limit", type=float, default=LIMIT_S, help="seconds that a test file may take")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TIMES] = Counter()
    # With xdist its workers hand their reports to the process that the user started.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Clock(config.stash[TIMES]))


class _Clock:
    def __init__(self, times: Counter[str]) -> None:
        self._times = times

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._times[report.nodeid.partition("::")[0]] += report.duration

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if os.environ.get("CI") == "true" and _slow(session.config) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _slow(config: pytest.Config) -> Iterable[str]:
    return too_slow(config.stash[TIMES], config.getoption("--file-limit"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    times = config.stash[TIMES]
    for name in _slow(config):
        terminalreporter.write_line(f"{name} takes {times[name]:.0f} s: make it quicker, or say why in {__name__}.SLOW")
    if os.environ.get("CI") == "true":
        terminalreporter.section("seconds by file")
        for name, seconds in times.most_common(25):
            terminalreporter.write_line(f"{seconds:8.1f} {name}")
