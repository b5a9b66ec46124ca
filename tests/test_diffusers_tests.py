"""What tools/diffusers_tests.py makes of pytest's report."""

import pytest

tool = pytest.importorskip("tools.diffusers_tests", reason="not a source checkout")
REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a.A" name="test_1"><properties>
<property name="calls" value="3"/></properties></testcase>
<testcase classname="tests.test_a.A" name="test_2"><skipped message=""/></testcase>
<testcase classname="tests.test_a.A" name="test_3"><failure message="&#10;one&#10;two"/></testcase>
</testsuite></testsuites>"""


def test_messages_may_be_empty_and_begin_with_an_empty_line(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    found = tool._read(tmp_path / "report.xml")
    assert {name: (x.outcome, x.message, x.calls) for (_, name), x in found.items()} == {
        "test_1": ("passed", "", 3),
        "test_2": ("skipped", "", 0),
        "test_3": ("failed", "one two", 0),
    }
