"""The page's parts, and the whole page in a real browser where there is one."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hpc_neuro.report import charts, html
from hpc_neuro.report.html import Cell, Column


def test_text_is_escaped_everywhere() -> None:
    bad = "<script>&\"'"
    parts = [
        html.paragraph(bad),
        html.table([Column(bad, bad)], [[Cell(bad, note=bad)]]),
        html.definitions([(bad, bad)]),
        html.picture(b"x", bad),
        html.details(bad, ""),
        html.code(bad),
        charts.draw_lines(bad, [charts.Series(bad, [0, 1], [0, 1])], bad, bad),
        charts.draw_pairs(bad, [bad], [[1.0]], bad),
        charts.draw_differences(bad, [(bad, 1.0, None, None)], bad),
    ]
    for part in parts:
        assert "<script>" not in part
        ElementTree.fromstring(f"<x>{part}</x>")  # well formed


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.12345, 3, "0.123"),
        (-1.5, 1, "\N{MINUS SIGN}1.5"),
        (12345.0, 0, "12\N{THIN SPACE}345"),
        (-0.04, 1, "0.0"),
        (None, 2, "\N{EN DASH}"),
        (float("inf"), 2, "\N{INFINITY}"),
    ],
)
def test_numbers_for_people(value: float | None, digits: int, text: str) -> None:
    assert html.format_number(value, digits) == text


def test_a_number_with_a_sign() -> None:
    assert html.format_number(0.5, 1, signed=True) == "+0.5"
    assert html.format_number(0.04, 1, signed=True) == "0.0"
    assert html.format_number(-0.5, 1, signed=True) == "\N{MINUS SIGN}0.5"


def test_backticks_are_code() -> None:
    assert html.paragraph("run `a <b>`, then `c`") == "<p>run <code>a &lt;b&gt;</code>, then <code>c</code></p>"
    assert html.paragraph("one ` alone") == "<p>one ` alone</p>"


def test_columns_without_content_are_left_out() -> None:
    columns = [Column("a"), Column("empty"), Column("none"), Column("zero")]
    rows = [
        [Cell("1"), Cell(""), Cell(html.format_number(None, 1)), Cell("0", 0)],
        [Cell(""), Cell(""), Cell(""), Cell("")],
    ]
    shown, cells = html.drop_empty_columns(columns, rows)
    assert [column.title for column in shown] == ["a", "zero"]
    assert [[cell.text for cell in row] for row in cells] == [["1", "0"], ["", ""]]


def points(svg: str) -> list[tuple[float, float]]:
    path = re.search(r'<polyline[^>]*points="([^"]+)"', svg)
    assert path
    return [tuple(map(float, p.split(","))) for p in path[1].split()]  # type: ignore[misc]


def test_a_line_chart_puts_points_where_they_belong() -> None:
    linear = points(charts.draw_lines("t", [charts.Series("s", [0, 5, 10], [0, 5, 10])], "x", "y"))
    assert linear[1][0] == pytest.approx((linear[0][0] + linear[2][0]) / 2, abs=0.1)
    assert linear[1][1] == pytest.approx((linear[0][1] + linear[2][1]) / 2, abs=0.1)
    assert linear[0][1] > linear[2][1]  # up is more
    log = points(charts.draw_lines("t", [charts.Series("s", [0, 1, 2, 3], [1, 10, 0, 100])], "x", "y", log_y=True))
    assert len(log) == 3  # zero has no place on a log axis
    assert log[1][1] == pytest.approx((log[0][1] + log[2][1]) / 2, abs=0.1)


def test_an_axis_with_negative_values_is_linear() -> None:
    series = [charts.Series("cosine", [0, 1, 2], [-0.5, 0.0, 0.5]), charts.Series("loss", [0, 1, 2], [1.0, 0.1, 0.01])]
    chart = charts.draw_lines("t", series, "x", "y", log_y=True)
    first = points(chart)
    assert len(first) == 3
    assert first[1][1] == pytest.approx((first[0][1] + first[2][1]) / 2, abs=0.1)
    assert ">-0.5<" in chart


def test_charts_of_nothing_little_and_much() -> None:
    assert "nothing was recorded" in charts.draw_lines("t", [charts.Series("s", [], [])], "x", "y")
    assert "nothing was recorded" in charts.draw_lines("t", [charts.Series("s", [1.0], [float("nan")])], "x", "y")
    assert "<circle" in charts.draw_lines("t", [charts.Series("s", [3], [7])], "x", "y")
    many = points(charts.draw_lines("t", [charts.Series("s", range(100_000), range(100_000))], "x", "y"))
    assert 200 <= len(many) <= 400


def test_many_methods_with_long_names_stay_apart() -> None:
    """A row each, names beside the axis and cut where they are long: a study of many models stays readable."""
    names = [f"m{i}_{'x' * 60}_end{i}" for i in range(12)]
    for svg in (
        charts.draw_pairs("t", names, [list(range(12)), list(range(12))], ""),
        charts.draw_differences("t", [(n, 1.0, 0.5, 2.0) for n in names], ""),
    ):
        labels = re.findall(r'x="([\d.]+)" y="([\d.]+)"[^>]*>(m\d+_[^<]+)', svg)
        places = [(float(x), float(y), t) for x, y, t in labels]
        assert [t[:3] for _, _, t in places] == [n[:3] for n in names]
        assert all(len(t) <= 34 and t.endswith(n[-4:]) for (_, _, t), n in zip(places, names, strict=True))
        assert all(b[1] - a[1] >= 20 for a, b in itertools.pairwise(places))
        dots = [float(x) for x in re.findall(r'<circle[^>]*cx="([\d.]+)"', svg)]
        assert min(dots) > max(x for x, _, _ in places)


def page() -> str:
    rows = [[Cell(n, None), Cell(str(v), v)] for n, v in (("n2", 2.0), ("n10", 10.0), ("n1", 1.0))]
    rows.append([Cell("none"), Cell("", None)])
    table = html.table([Column("Name", numeric=False), Column("Value")], rows)
    wide = html.table([Column(f"Column {i}") for i in range(30)], [[Cell("1.234 and more")] * 30])
    figure = html.row([charts.draw_pairs("p", ["a"], [[1.0]], "")])
    return html.render_page("Title", "under it", [("One", table), ("Two", figure), ("Three", wide)])


def test_the_page_needs_nothing_else() -> None:
    assert not re.search(r'(src|href)="(?!data:|#)', page())
    assert "url(" not in page()
    assert "@import" not in page()


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here; install it (apt-get install chromium) to run this test")
    probe = """<script>
      const order = () => [...document.querySelector("tbody").rows].map((r) => r.cells[0].textContent).join(" ");
      const click = (i) => document.querySelectorAll("th button")[i].click();
      const seen = [order()];
      for (const i of [1, 1, 0, 0]) { click(i); seen.push(order()); }
      document.body.dataset.seen = seen.join("; ");
      document.body.dataset.over = document.documentElement.scrollWidth - innerWidth;
      document.body.dataset.sort = document.querySelector("th").getAttribute("aria-sort");
    </script></body>"""
    file = tmp_path / "page.html"
    file.write_text(page().replace("</body>", probe))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    flags.append("--window-size=500,900")
    with tempfile.TemporaryDirectory() as profile:
        run = subprocess.run(
            [browser, *flags, f"--user-data-dir={profile}", file.as_uri()], capture_output=True, text=True, timeout=120
        )
    seen = re.search(r'data-seen="([^"]+)"', run.stdout)
    assert seen, run.stderr[-2000:]
    assert seen[1].split("; ") == [
        "n2 n10 n1 none",
        "n10 n2 n1 none",
        "n1 n2 n10 none",
        "n1 n2 n10 none",
        "none n10 n2 n1",
    ]
    assert 'data-sort="descending"' in run.stdout
    over = re.search(r'data-over="(-?\d+)"', run.stdout)
    assert over
    assert int(over[1]) <= 0  # a wide table scrolls within the page, on a phone too
