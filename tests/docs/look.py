# SPDX-License-Identifier: Apache-2.0
"""The built site in a browser: `make docs-look`. Not a part of `make test`, which knows no browser.

Every page, as wide as a desktop and as a phone: its headings are there, it is no wider than the window, pictures load,
nothing is fetched from elsewhere, no error is written to the console. Search and filters find what they should.
Screenshots stay in out/look. Those of a few pages are compared with the small pictures in tests/docs/pictures, so that
a change of the layout is noticed: `LOOK_WRITE=1 make docs-look` takes the pictures of now.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image
from playwright import sync_api

ROOT = Path(__file__).parents[2]
SITE, PICTURES = ROOT / "out" / "site", ROOT / "out" / "look"
PAGES = sorted(path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md"))
WIDTHS = {"desktop": 1280, "phone": 390}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FOUND = {  # what a reader types → the page that has to be among the first results
    "hotswap_adapter": "reference/serving/",
    "adapter_names": "several_adapters/",
    "fully_shard": "distributed/",
    "bitsandbytes": "storages/",
    "AlreadyInjectedError": "reference/errors/",
    "carrier": "glossary/",
    "alora_invocation_tokens": "reference/configs/",
    "add a method": "add_a_method/",
    "slots": "serving/",
    "TRL": "training/",
}
FIRST = 3  # pages
KEPT = Path(__file__).with_name("pictures")
COMPARED = ("index", "getting_started", "performance_rows", "reference/errors")  # pages
SMALL = 48, 36  # pixels of a kept picture
DEVIATION = 3.0  # mean difference of the grey values, of 255; two pages of text differ by 6, home from others by 31


def chromium() -> str:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.fail(
            f"There is no browser: none of {', '.join(BROWSERS)} is on the path. Install Chromium (Debian and Ubuntu: "
            "apt install chromium), or say where one is: CHROMIUM=/path/to/chrome make docs-look."
        )
    return found


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Write nothing."""


@pytest.fixture(scope="module")
def address():
    if not (SITE / "index.html").exists():
        pytest.fail(f"{SITE} has no site: run make docs first.")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def tab(browser, request):
    """An empty tab that notes what it asks others for, and what goes wrong in it."""
    width = WIDTHS[getattr(request, "param", "desktop")]
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.elsewhere, page.wrong = [], []

    def note(asked) -> None:
        if not asked.url.startswith(("http://127.0.0.1", "data:")):
            page.elsewhere.append(asked.url)

    page.on("request", note)
    page.on("console", lambda m: page.wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    yield page
    page.close()


def url_of(page: Path) -> str:
    path = page.with_suffix("").as_posix()
    return path.removesuffix("index") if path.endswith("index") else f"{path}/"


def headings(page: Path) -> list[str]:
    """Titles of the page's source, without its code and its marks."""
    text = re.sub(r"^```.*?^```", "", (ROOT / "docs" / page).read_text(), flags=re.M | re.S)
    return [re.sub(r"[`*]", "", title).strip() for title in re.findall(r"^#{1,2} (.+)$", text, re.M)]


@pytest.mark.parametrize("page", PAGES, ids=str)
@pytest.mark.parametrize("tab", WIDTHS, indirect=True)
def test_a_page(tab, address, page):
    answer = tab.goto(address + url_of(page))
    assert answer.status == 200
    tab.wait_for_load_state("networkidle")
    shown = [text.replace("¶", "").strip() for text in tab.locator("article :is(h1, h2)").all_inner_texts()]
    assert headings(page) and not set(headings(page)) - set(shown)
    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / page).read_text(), re.M):
        assert tab.locator(f"[id='{name}']").count() == 1, name
    PICTURES.mkdir(parents=True, exist_ok=True)
    width = tab.viewport_size["width"]
    tab.screenshot(path=PICTURES / f"{'-'.join(page.with_suffix('').parts)}-{width}.png")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the window"
    for picture in tab.locator("article img").all():
        assert picture.evaluate("i => i.complete && i.naturalWidth > 0"), picture.get_attribute("src")
    assert not tab.elsewhere and not tab.wrong


def test_a_config_has_a_table_of_its_fields(tab, address):
    """From comments in the source, and with fields of the classes that it derives from."""
    tab.goto(address + "reference/configs/")
    entry = tab.locator(".doc-class", has=tab.locator("[id='graft.methods.lora.config.LoraConfig']"))
    cells = [row.inner_text().split("\t") for row in entry.get_by_role("row").all()]
    rows = {name.strip(): (kind.strip(), said.strip()) for name, kind, said in (c for c in cells if len(c) == 3)}
    assert rows["qalora_group_size"] == ("int", "Inputs in a group. Default: 16.")
    assert rows["exclude_modules"][1] == "Names, suffixes or one regex. Default: None."
    assert "task_type" not in rows  # of PeftConfig, which has an entry


def shrink(picture: bytes) -> Image.Image:
    """Return a screenshot as a small picture in grey."""
    return Image.open(io.BytesIO(picture)).convert("L").resize(SMALL, Image.Resampling.BOX)


@pytest.mark.parametrize("page", COMPARED)
@pytest.mark.parametrize("tab", WIDTHS, indirect=True)
def test_a_page_looks_as_before(tab, address, page):
    tab.goto(address + url_of(Path(page)))
    tab.wait_for_load_state("networkidle")
    small = shrink(tab.screenshot())
    kept = KEPT / f"{page.replace('/', '-')}-{tab.viewport_size['width']}.png"
    if os.environ.get("LOOK_WRITE"):
        kept.parent.mkdir(exist_ok=True)
        small.save(kept)
    before = shrink(kept.read_bytes())
    pairs = [*zip(small.tobytes(), before.tobytes(), strict=True)]
    deviation = sum(abs(a - b) for a, b in pairs) / len(pairs)
    assert deviation <= DEVIATION, (
        f"{kept.name} differs by {deviation:.1f}: look at it, then LOOK_WRITE=1 make docs-look"
    )


def test_a_long_table_has_a_filter(tab, address):
    tab.goto(address + "performance_rows/")
    field, rows = tab.locator("input.filter").first, tab.locator("article table").first.locator("tbody tr:visible")
    every = rows.count()
    field.fill("nf4 memory")
    assert 0 < rows.count() < every
    assert all("NF4" in text and "memory" in text for text in rows.all_inner_texts())
    field.fill("")
    assert rows.count() == every > 30


def search(tab, text: str) -> None:
    field = tab.get_by_role("textbox", name="Search")
    field.click()
    field.press_sequentially(text)


@pytest.mark.parametrize("text", FOUND)
def test_search_finds(tab, address, text):
    tab.goto(address)
    search(tab, text)
    results = tab.locator("a.md-search-result__link")
    results.first.wait_for(timeout=10_000)
    links = results.evaluate_all("all => all.map(a => a.href)")
    found = list(dict.fromkeys(re.split("[?#]", link)[0].removeprefix(address) for link in links))
    assert FOUND[text] in found[:FIRST], found


def test_search_finds_nothing_for_nonsense(tab, address):
    """So that the test before does not pass whatever is shown."""
    tab.goto(address)
    search(tab, "qqzzxxyy")
    tab.get_by_text("No matching documents").wait_for(timeout=10_000)
    assert not tab.locator("a.md-search-result__link").count()


@pytest.mark.parametrize("tab", WIDTHS, indirect=True)
def test_a_link_of_the_navigation_leads_to_its_page(tab, address):
    """On a phone the navigation is behind a button, and its sections are closed."""
    tab.goto(address)
    if tab.viewport_size["width"] == WIDTHS["phone"]:
        tab.locator("label.md-header__button[for=__drawer]").click()
        tab.locator("nav.md-nav--primary label.md-nav__title", has_text="Guide").click()
        tab.locator("nav.md-nav--primary label.md-nav__link", has_text="About").click()
    else:
        tab.locator("nav.md-tabs").get_by_role("link", name="About").click()
    tab.locator("nav.md-nav--primary").get_by_role("link", name="Glossary").click()
    tab.wait_for_load_state("networkidle")
    assert tab.url == address + "glossary/"
