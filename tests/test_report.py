"""The report: one file that needs nothing else, shows everything as text, and works in a real browser."""

from __future__ import annotations

import errno
import json
import math
import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
from browser import chromium
from PIL import Image

from prefs.errors import UserError
from prefs.results.html import Example, Rated, Report, write_report
from prefs.results.result import Figure, Result, Table
from prefs.store import files

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

SCRIPT = "<script>window.hostile = 1</script><img src=x onerror='window.hostile = 2'>"
HOSTILE = {
    "script": SCRIPT,
    "end of script": "</script></style></pre></textarea>--><script>window.hostile = 3</script>",
    "template": "{{ 7*7 }} {% raw %} {# gone #}",
    "formula": "$x$ $$y$$ \\(z\\)",
    "quotes": '" onmouseover="window.hostile = 4" \' &amp; &#60;',
    "long word": "w" * 3000,
    "right to left": "שלום \u202eעולם",
    "lines": "\n\n  two empty lines before,\ttabs\n\nand   spaces\n",
}
CONTROL = "NUL \x00 bell \x07 escape \x1b[31m delete \x7f C1 \x85 half \ud83d a pair \ufffe end"
LONG = "What is the sum? " * 6000


class Page(HTMLParser):
    """A page as a parser sees it: its elements, its text, and the text of each ``pre``."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.pres: list[str] = []
        self._inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = [tag]
        if tag == "pre":
            self.pres.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = []

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._inside == ["pre"]:
            self.pres[-1] += data

    def attributes(self, *names: str) -> list[str]:
        return [value or "" for _, given in self.elements for name, value in given.items() if name in names]


def report(
    *, tables: tuple[Table, ...] = (), figures: Mapping[str, Path] | None = None, examples: tuple[Example, ...] = ()
) -> Report:
    """A report of one section."""
    result = Result(
        "Stability", "Over tasks.", tables, figures=drawn(figures or {}), remarks=("Sampled ratings are mostly noise.",)
    )
    return Report(
        title="sweep",
        when="2026-11-24 07:00",
        command="python -m prefs.run -m template=anchored,likert",
        results=[result],
        figures=figures or {},
        examples=examples,
        examples_note="Some of the tasks.",
        configs=[("0", "model: smollm2\n")],
    )


def drawn(figures: Mapping[str, Path]) -> tuple[Figure, ...]:
    return tuple(Figure(name, draw=Path.touch) for name in figures)


def example(task: str = "t1", prompt: str = "Say hi.", origin: str = "MATH", **of_cell: str | None) -> Example:
    """A task with completions by cell."""
    ratings = [Rated(cell, text, False, "3.62 (mass .95)", ("5", "3")) for cell, text in of_cell.items()]
    return Example(task, origin, prompt, tuple(ratings))


def everywhere(folder: Path, text: str) -> Report:
    """A report whose every word is the user's."""
    frame = pd.DataFrame({text: [text], "x": [math.nan], "x_reason": [text]})
    tables = (Table("t", frame, title=text, note=text),)
    return Report(
        title=text,
        when=text,
        command=text,
        results=[Result(text, text, tables, figures=(Figure("f", Path.touch, title=text),), remarks=(text,))],
        figures={"f": picture(folder / "f.png")},
        examples=(Example(text, text, text, (Rated(text, text, True, text, (text, "5")),)),),
        examples_note=text,
        configs=[(text, text)],
    )


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    Image.new("RGB", size, "#0072B2").save(path)
    return path


def page_of(folder: Path, *examples: Example, tables: tuple[Table, ...] = ()) -> Page:
    return Page(write_report(folder / "report.html", report(tables=tables, examples=examples)))


def printed(tmp_path: Path, frame: pd.DataFrame) -> list[list[str]]:
    """A table's header and rows as they are printed."""
    path = write_report(tmp_path / "report.html", report(tables=(Table("numbers", frame),)))
    table = path.read_text(encoding="utf-8").split("<table")[1].split("</table>")[0]
    rows = re.findall(r"<tr.*?</tr>", table, flags=re.DOTALL)
    texts = [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]
    return [[" ".join(text.split()) for text in row] for row in texts]


class TestTables:
    @pytest.mark.parametrize(
        ("values", "beside", "texts"),
        [
            ([0.62, -0.05, 1.0, math.nan, -0.001], {}, [".62", "−.05", "1.00", "–", ".00"]),
            # Counts have no decimals, also where one is missing.
            ([64, 1280345], {}, ["64", "1,280,345"]),
            ([64.0, math.nan, -1200.0], {}, ["64", "–", "−1,200"]),
            # An estimate that happens to be integral keeps its decimals.
            ([1.0, 0.0], {"x_reason": [None, None]}, ["1.00", ".00"]),
            ([2.0], {"x_low": [1.25], "x_high": [2.5]}, ["2.00"]),
            # Small numbers are told apart.
            ([0.0423, 0.0051], {}, [".042", ".005"]),
            ([0.00423, -0.00051], {}, [".0042", "−.0005"]),
            # Words stay as they are.
            (["MATH", None, "0.50", ""], {}, ["MATH", "–", "0.50", ""]),
            ([True, False], {}, ["yes", "no"]),
        ],
    )
    def test_a_column_is_printed_as_in_papers(self, tmp_path, values, beside, texts):
        assert [row[0] for row in printed(tmp_path, pd.DataFrame({"x": values, **beside}))[1:]] == texts

    def test_intervals_are_folded_into_one_cell_behind_the_value(self, tmp_path):
        r, low, high = [0.21, 0.5, math.nan], [0.1, math.nan, math.nan], [0.32, math.nan, math.nan]
        columns = {"r": r, "r_low": low, "r_high": high, "r_reason": [None, None, "no refusals"], "n": [386, 299, 240]}
        assert printed(tmp_path, pd.DataFrame(columns)) == [
            ["r", "n"],
            [".21", "[.10, .32]", "386"],
            [".50", "", "299"],
            ["– no refusals", "240"],
        ]
        # Of fewer tasks than its row.
        frame = pd.DataFrame({"r": [0.5, 0.5], "r_low": [0.4] * 2, "r_high": [0.6] * 2, "r_n": [3, 2], "n": [3, 3]})
        assert printed(tmp_path, frame)[1:] == [[".50", "[.40, .60]", "3"], [".50", "[.40, .60] n = 2", "3"]]
        # No place is kept for intervals that are all missing.
        frame = pd.DataFrame({"r": [0.5], "r_low": [None], "r_high": [None], "r_reason": [None], "n": [3]})
        assert printed(tmp_path, frame)[1:] == [[".50", "3"]]


class TestText:
    @pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
    def test_is_shown_as_it_is_everywhere(self, tmp_path, text):
        page, harmless = (
            Page(write_report(tmp_path / "report.html", everywhere(tmp_path, words))) for words in (text, "ok")
        )
        # But for a column's name and a prompt's first words, which have no lines and no end.
        assert harmless.text.count("ok") - page.text.count(text) in (0, 1, 2)
        assert [tag for tag, _ in page.elements] == [tag for tag, _ in harmless.elements]
        assert page.pres == ["\n" + text] * 4
        assert not page.attributes("onerror", "onmouseover", "onclick", "style")
        assert page.attributes("alt") == page.attributes("data-cell") == page.attributes("data-origin") == [text]

    def test_is_not_cut_and_control_characters_are_made_visible(self, tmp_path):
        shown = "NUL ␀ bell ␇ escape ␛[31m delete ␡ C1 � half � a pair � end"
        assert page_of(tmp_path, example(prompt=LONG, cell=CONTROL)).pres[1:3] == ["\n" + LONG, "\n" + shown]

    def test_a_completion_is_shown_once_with_the_cells_that_rated_it(self, tmp_path):
        page = page_of(tmp_path, example(a="Same.", b="Other.", c="Same.", d=None, e=""))
        assert page.pres[1:-1] == ["\nSay hi.", "\nSame.", "\nOther."]
        assert page.attributes("data-cell") == ["a", "c", "b", "d", "e"]
        assert "There is no completion." in page.text
        assert "The completion is empty." in page.text


class TestFile:
    def test_needs_nothing_else(self, tmp_path):
        figures = {"one": picture(tmp_path / "1.png"), "two": picture(tmp_path / "2.png", (90, 20))}
        path = write_report(tmp_path / "new" / "report.html", report(figures=figures, examples=(example(cell="Hi."),)))
        page = Page(path)
        assert all(link.startswith(("#", "data:")) for link in page.attributes("src", "href", "srcset", "action"))
        assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
        assert not re.search(r"https?:|//[a-z]|@import|url\(", path.read_text(encoding="utf-8").replace("// ", ""))
        policy = next(content for content in page.attributes("content") if "default-src" in content)
        assert policy.startswith("default-src 'none'; img-src data:;")
        assert [given["class"] for tag, given in page.elements if tag == "figure" and "class" in given] == ["wide"]
        assert [file.name for file in path.parent.iterdir()] == ["report.html"]

    def test_a_full_disk_is_one_line_and_leaves_the_old_report(self, tmp_path, monkeypatch):
        path = write_report(tmp_path / "report.html", report())
        before = path.read_bytes()

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(files.os, "fsync", full)
        with pytest.raises(UserError, match=r"^cannot write .*report\.html: No space left on device$"):
            write_report(path, report())
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["report.html"]

    @pytest.mark.parametrize("content", [None, b"not a picture"])
    def test_a_figure_that_cannot_be_read_is_one_line(self, tmp_path, content):
        path = tmp_path / "gone.png"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=r"^cannot read figure .*gone\.png: .+$"):
            write_report(tmp_path / "report.html", report(figures={"gone": path}))


VALUES = [10.5, math.nan, 9.25, -1.5, 100.0]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it, hostile text everywhere."""
    folder = tmp_path_factory.mktemp("report")
    frame = pd.DataFrame(
        {
            "name": ["b10", "b9", "a", "c", "d"],
            "x": VALUES,
            "x_low": [value - 1 for value in VALUES],
            "x_high": [value + 1 for value in VALUES],
            "x_reason": [None, "no variance in ratings", None, None, None],
            "n": [1, 2, 3, 4, 5000],
        }
    )
    wide = pd.DataFrame({f"a_rather_long_name_{at}": [at / 7] for at in range(30)})
    hostile = pd.DataFrame({name: [text] for name, text in HOSTILE.items()} | {SCRIPT: [SCRIPT]})
    figures = {
        f"{number} {SCRIPT}": picture(folder / f"{number}.png", size)
        for number, size in enumerate([(1400, 400), (900, 600)])
    }
    examples = [
        example(f"hostile-{at}", text, "HOSTILE", **{"smollm2-likert": text})
        for at, text in enumerate(HOSTILE.values())
    ]
    ratings = (
        Rated("smollm2-anchored", "It is four.", False, "3.62 (mass .95)", ("5", "out_of_range: 10")),
        Rated("gemma-anchored", "No.", True, "1.05 (mass 1.00)", ("1", "1")),
    )
    examples.append(Example("math-01", "MATH", "What is 2 + 2?", ratings))
    examples.append(example("long-01", LONG, "MATH", **{"gemma-anchored": CONTROL}))
    whole = Report(
        title=SCRIPT,
        when="2026-11-24 07:00",
        command="python -m prefs.run " + "w" * 500,
        results=[
            Result(
                "Stability",
                "Over tasks.",
                (Table("numbers", frame), Table("wide", wide)),
                figures=drawn(figures),
                remarks=tuple(HOSTILE.values()),
            ),
            Result(SCRIPT, SCRIPT, (Table("hostile", hostile, SCRIPT, SCRIPT),)),
        ],
        figures=figures,
        examples=tuple(examples),
        examples_note="Some of the tasks.",
        configs=tuple(HOSTILE.items()),
    )
    return write_report(folder / "report.html", whole)


@pytest.fixture
def page(browser: Chrome, page_path: Path) -> Chrome:
    """The browser with the report freshly open, what it logged before forgotten."""
    browser.set_window_size(1300, 900)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(page_path.as_uri())
    return browser


def texts(page: Chrome, selector: str) -> list[str]:
    return page.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(each => each.textContent.trim())", selector
    )


def tasks_shown(page: Chrome) -> list[str]:
    return [each.text for each in page.find_elements("css selector", ".example .task") if each.is_displayed()]


@pytest.mark.browser
class TestInABrowser:
    def test_opens_in_peace_asks_for_nothing_and_runs_nothing_of_the_users(self, page, page_path):
        page.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
        assert page.get_log("browser") == []
        events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
        asked = [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]
        assert page_path.as_uri() in asked
        own = ("data:image/png", "chrome://")  # the second are of the empty page that the browser begins with
        assert [url for url in asked if url != page_path.as_uri() and not url.startswith(own)] == []
        assert page.execute_script("return window.hostile") is None
        assert page.title == SCRIPT

    def test_every_figure_is_there_and_can_be_enlarged(self, page):
        sizes = page.execute_script("return [...document.images].map(each => [each.naturalWidth, each.alt])")
        assert sizes == [[1400, f"0 {SCRIPT}"], [900, f"1 {SCRIPT}"]]
        page.find_element("css selector", ".enlarge").click()
        enlarged = page.find_element("css selector", "dialog[open] img")
        assert enlarged.size["width"] == 1400
        enlarged.click()
        assert page.find_elements("css selector", "dialog[open]") == []

    def test_a_click_on_a_header_sorts_another_reverses_and_missing_stays_last(self, page):
        def shown(column: int) -> list[str]:
            return texts(page, f"#section-1 .table tbody tr > :nth-child({column})")[: len(VALUES)]

        name, x, n = page.find_elements("css selector", ".sortable")[0].find_elements("css selector", "th button")
        x.click()
        assert shown(2) == ["−1.50", "9.25", "10.50", "100.00", "– no variance in ratings"]
        assert shown(1) == ["c", "a", "b10", "d", "b9"]
        assert page.execute_script("return arguments[0].parentElement.ariaSort", x) == "ascending"
        x.click()
        assert shown(2) == ["100.00", "10.50", "9.25", "−1.50", "– no variance in ratings"]
        assert page.execute_script("return arguments[0].parentElement.ariaSort", x) == "descending"
        n.send_keys(" ")
        assert shown(1) == ["b10", "b9", "a", "c", "d"]
        assert page.execute_script("return document.querySelectorAll('[aria-sort]').length") == 1
        name.send_keys("\n")
        assert shown(1) == ["a", "b9", "b10", "c", "d"]

    def test_the_filter_hides_and_counts(self, page):
        text, origin, cell, count = (
            page.find_element("id", f"filter-{each}") for each in ("text", "origin", "cell", "count")
        )
        assert count.text == "10 of 10 shown"
        text.send_keys("2 + 2")
        assert (count.text, tasks_shown(page)) == ("1 of 10 shown", ["math-01"])
        text.clear()
        text.send_keys("FOUR.")
        assert tasks_shown(page) == ["math-01"]
        text.clear()
        origin.send_keys("MATH")
        assert (count.text, tasks_shown(page)) == ("2 of 10 shown", ["math-01", "long-01"])
        cell.send_keys("smollm2-anchored")
        assert (count.text, tasks_shown(page)) == ("1 of 10 shown", ["math-01"])
        page.find_element("css selector", ".example:not([hidden]) summary").click()
        body = page.find_element("css selector", ".example[open] .body").text
        assert "It is four." in body
        assert "gemma-anchored" not in body
        text.send_keys("nowhere to be found")
        assert (count.text, tasks_shown(page)) == ("0 of 10 shown", [])

    def test_an_example_opens_and_shows_prompt_completions_and_ratings(self, page):
        opened = page.find_elements("css selector", ".example")[-2]
        body = opened.find_element("css selector", ".body")
        assert not body.is_displayed()
        opened.find_element("css selector", "summary").click()
        assert [" ".join(line.split()) for line in body.text.splitlines()] == [
            "Prompt",
            "What is 2 + 2?",
            "Completion 1 of 2 not refused",
            "It is four.",
            "cell exact sampled",
            "smollm2-anchored 3.62 (mass .95) 5 out_of_range: 10",
            "Completion 2 of 2 refused",
            "No.",
            "cell exact sampled",
            "gemma-anchored 1.05 (mass 1.00) 1 1",
        ]

    @pytest.mark.parametrize("width", [400, 800, 1300])
    def test_nothing_sticks_out_sideways(self, page, width):
        page.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False},
        )
        try:
            page.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
            wide, available = page.execute_script(
                "return (({scrollWidth, clientWidth}) => [scrollWidth, clientWidth])(document.documentElement)"
            )
            assert wide == available <= width
        finally:
            page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def test_without_scripts_everything_is_there(self, page):
        page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        try:
            page.refresh()
            assert not page.find_element("css selector", ".filter").is_displayed()
            assert page.find_elements("css selector", "th button") == []
            page.find_elements("css selector", ".example summary")[-2].click()
            assert "It is four." in page.find_element("css selector", ".example[open] .body").text
        finally:
            page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
