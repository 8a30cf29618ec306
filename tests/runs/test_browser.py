"""The report in a real browser: on a phone and on a desktop, light and dark."""

import json
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

from tests.support import recorded

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (apt-get install chromium)"),
]
# Chromium's numbers for what a page is told the user prefers.
SCHEMES = {"dark": 0, "light": 1}
PAPER = {"dark": "rgb(13, 17, 23)", "light": "rgb(255, 255, 255)"}

# The page in a frame of the wanted width; the frame tells what it looks like from inside.
HARNESS = """<!doctype html><meta charset="utf-8">
<iframe id="frame" style="border: 0; width: {width}px; height: 900px" srcdoc="{report}"></iframe>
<pre id="seen"></pre>
<script>
frame.onload = () => {{
  const inside = frame.contentWindow, page = inside.document;
  page.querySelectorAll("details").forEach(each => each.open = true);
  const right = each => each.getBoundingClientRect().right;
  const free = [...page.querySelectorAll("body *")].filter(each => !each.closest(".wide"));
  const shown = each => each.checkVisibility() && each.getBoundingClientRect().height > 0;
  seen.textContent = JSON.stringify({{
    title: page.title,
    width: inside.innerWidth,
    needed: page.documentElement.scrollWidth,
    outside: free.filter(each => right(each) > inside.innerWidth + 0.5).map(each => each.outerHTML.slice(0, 80)),
    requests: inside.performance.getEntriesByType("resource").map(each => each.name),
    scripts: page.scripts.length,
    paper: inside.getComputedStyle(page.body).backgroundColor,
    figures: [...page.querySelectorAll(".headline dd")].filter(shown).map(each => each.firstChild.textContent),
    pictures: [...page.querySelectorAll("svg.chart")].filter(shown).map(each => each.getBoundingClientRect().width),
    smallest: Math.min(...[...page.querySelectorAll("svg.chart")].map(
        each => 11 * each.getBoundingClientRect().width / each.viewBox.baseVal.width)),
  }});
}};
</script>
"""


@pytest.fixture(scope="module", params=["plain", "private"])
def run(request, tmp_path_factory):
    return getattr(recorded, request.param)(tmp_path_factory.mktemp("shown"))


def chromium(page: Path, scheme: str, width: int, *options: str) -> subprocess.CompletedProcess:
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={max(width, 500)},1000"]
    command += [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", *options, f"file://{page}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_fits_reads_and_fetches_nothing(width, scheme, run, tmp_path):
    report = (run / "report.html").read_text()
    harness = tmp_path / "harness.html"
    harness.write_text(HARNESS.format(width=width, report=escape(report)))
    told = chromium(harness, scheme, width, "--virtual-time-budget=2000", "--dump-dom")
    assert "CONSOLE" not in told.stderr, told.stderr
    seen = json.loads(unescape(told.stdout.split('<pre id="seen">')[1].split("</pre>")[0]))
    assert seen["title"] == f"{run.name} · Bouquet"
    assert seen["width"] == width
    assert seen["needed"] <= width
    assert seen["outside"] == []
    assert seen["requests"] == []
    assert seen["scripts"] == 0
    assert seen["paper"] == PAPER[scheme]
    assert seen["figures"][0] == "3 of 3"
    assert len(seen["figures"]) >= 5
    if run.name == "plain":
        assert len(seen["pictures"]) == 3
        assert seen["smallest"] > 10
        summary = json.loads((run / "summary.json").read_text())
        assert seen["figures"][1] == f"{summary['after']['all']:#.4g}"


def test_the_page_itself_loads_from_disk_without_a_word(run, tmp_path):
    page = Path(shutil.copy(run / "report.html", tmp_path))
    picture = tmp_path / "report.png"
    told = chromium(page, "light", 1280, f"--screenshot={picture}")
    assert "CONSOLE" not in told.stderr, told.stderr
    assert picture.stat().st_size > 20_000
