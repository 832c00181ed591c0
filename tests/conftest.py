"""Differences that tests measured, listed at the end of the run."""

import pytest

_differences = []


@pytest.fixture
def measured(request):
    """Call it with a difference and its limit: it is listed at the end of the run, and must be within the limit."""

    def check(difference, limit, what=""):
        name = request.node.name + (f" {what}" if what else "")
        _differences.append((request.node.path.name, name, difference, limit))
        assert difference <= limit, f"{what or name}: differs by {difference:.2e}, more than {limit:.0e}"

    return check


def pytest_terminal_summary(terminalreporter):
    if not _differences:
        return
    terminalreporter.section("largest relative differences")
    for file in dict.fromkeys(file for file, *_ in _differences):
        rows = [row for row in _differences if row[0] == file]
        for limit in sorted({row[3] for row in rows}):
            _, name, difference, _ = max((row for row in rows if row[3] == limit), key=lambda row: row[2])
            count = sum(row[3] == limit for row in rows)
            terminalreporter.write_line(
                f"{file}: {difference:.1e} of {limit:.0e} allowed, {count} compared ({name})"
            )
