import pytest

from tests.browser import HOSTILE as SCRIPTS
from tests.browser import RUN, scripts_run
from vstar_kernels.cli.page import data_uri, figure_uri, render

jinja2 = pytest.importorskip("jinja2")
HOSTILE = """<script>alert("x")</script>' onload='y"""


@pytest.fixture
def page(tmp_path):
    """Renders the body of a page from the text of a template of the caller's."""

    def run(body, **values):
        head = '{% extends "page.html" %}{% import "macros.html" as ui %}{% block body %}'
        (tmp_path / "own.html").write_text(head + body + "{% endblock %}")
        return render("own.html", tmp_path, **values)

    return run


def test_a_page_stands_alone_on_light_and_dark_screens(page):
    text = page("<p>{{ word }}</p>", word="σ")
    assert text.startswith("<!doctype html>")
    assert text.endswith("</html>\n")
    assert "<p>σ</p>" in text
    assert "prefers-color-scheme: dark" in text
    assert "http" not in text


def test_whatever_a_page_shows_is_escaped(page):
    text = page(
        "{% call ui.section(x) %}{{ x }}{% endcall %}{{ ui.facts([(x, x)]) }}"
        "{{ ui.table([x], [[x]], ours=0) }}{{ ui.figure(x, x, [x, x], dark=x) }}",
        x=HOSTILE,
    )
    assert "<script" not in text
    assert "' onload=" not in text
    assert text.count("&lt;script&gt;") == 11


def test_no_script_of_a_text_runs(page, tmp_path):
    text = page(
        "{% call ui.section(x) %}{{ x }}{% endcall %}{{ ui.facts([(x, x)]) }}"
        "{{ ui.table([x], [[x]], ours=0) }}{{ ui.figure(x, x, [x, x], dark=x) }}",
        x=SCRIPTS,
    )
    assert not scripts_run(text, tmp_path)
    for way in (f"<script>{RUN}</script>", f"<img src=x onerror={RUN}>"):
        assert scripts_run(text + way, tmp_path)  # the browser does run scripts


def test_a_value_that_a_template_lacks_is_an_error(page):
    with pytest.raises(jinja2.UndefinedError, match="word"):
        page("{{ word }}")


def test_images_are_in_the_page(page):
    uri = data_uri(b"\x00", "png")
    assert uri == "data:image/png;base64,AA=="
    text = page('{{ ui.figure(uri, "label", ["line", "line"]) }}', uri=uri)
    assert f'<img src="{uri}" alt="label">' in text
    assert "<figcaption>line<br>line</figcaption>" in text
    assert "<picture>" not in text


def test_a_figure_of_matplotlib_is_an_image():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    assert figure_uri(figure).startswith("data:image/svg+xml;base64,")
