"""The page in a real browser: what a person sees, that nothing is loaded, that nothing sticks out on a phone."""

import html
import http.server
import os
import re
import shutil
import subprocess
import threading

import fake_store
import pytest

FLAGS = (
    "--headless", "--hide-scrollbars", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--enable-logging=stderr", "--virtual-time-budget=3000",
)  # fmt: skip
DARK, LIGHT = 0, 1


@pytest.fixture
def chromium(tmp_path):
    """Opens a file and returns its DOM and what the console said."""
    binary = shutil.which("chromium")
    if binary is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is missing")
        pytest.skip("chromium is not installed")

    def call(text, scheme=LIGHT):
        page = tmp_path / "page.html"
        page.write_text(text, encoding="utf-8")
        profile = tmp_path / "profile"
        shutil.rmtree(profile, ignore_errors=True)
        options = [*FLAGS, f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={scheme}"]
        command = [binary, *options, "--window-size=1440,900", "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return call


@pytest.fixture
def page(report):
    return (report() / "index.html").read_text(encoding="utf-8")


@pytest.fixture
def server():
    """A web server on this machine that remembers what it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def without_policy(page):
    return re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)


def measured(chromium, page, width, question, scheme=LIGHT):
    """What a line of JavaScript answers in the page, untouched, in a frame of some width."""
    frame = f'<iframe id="f" width="{width}" height="800" style="border:0" srcdoc="{html.escape(page)}"></iframe>'
    script = f"""<script>onload = () => {{ const d = f.contentDocument, w = f.contentWindow;
        document.body.dataset.answer = String({question}); }}</script>"""
    dom, _ = chromium(f"<!doctype html><meta charset=utf-8><body>{frame}{script}", scheme)
    return html.unescape(re.search(r'data-answer="([^"]*)"', dom)[1])


def test_the_page_opens_without_a_word_on_the_console(chromium, page):
    dom, console = chromium(page)
    assert console == []
    for text in ("The pipeline", "language_identification", "byte entropy", "Romansh", ">gain</b>", "✓ passed"):
        assert text in dom


def test_the_console_is_really_heard(chromium, page):
    _, console = chromium(page.replace("<main", "<script>1</script><main"))
    assert any("Content Security Policy" in line for line in console), "the policy forbids any script"


def test_nothing_is_fetched_even_if_something_slipped_into_the_page(chromium, page, server):
    address, asked = server
    planted = f"""<img src="{address}/img"><script src="{address}/js"></script><link rel="stylesheet"
        href="{address}/css"><iframe src="{address}/frame"></iframe><style>@import "{address}/import";</style><main"""
    chromium(page)
    assert asked == []
    chromium(page.replace("<main", planted, 1))
    assert asked == []
    chromium(without_policy(page).replace("<main", planted, 1))
    assert {"/img", "/js", "/css", "/frame", "/import"} <= set(asked), "without the policy the test sees them all"


def test_markup_in_the_data_stays_text_even_without_the_policy(chromium, page):
    dom, _ = chromium(without_policy(page))
    assert re.search(r"<title>(.*?)</title>", dom)[1] == "quickstart \N{EN DASH} report"
    visible = "[...d.querySelectorAll('blockquote')].some(e => e.textContent.includes('<script>'))"
    assert measured(chromium, page, 800, visible) == "true"
    assert measured(chromium, page, 800, "d.querySelectorAll('script, img, [onload], [onerror]').length") == "0"


@pytest.mark.parametrize("width", [390, 768, 1440])
def test_nothing_sticks_out_sideways(chromium, page, width):
    question = "d.documentElement.scrollWidth + ' of ' + w.innerWidth"
    assert measured(chromium, page, width, question) == f"{width} of {width}"


def test_what_sticks_out_would_be_seen(chromium, page):
    wide = page.replace("<main", '<svg width="900" height="9"></svg><main', 1)
    assert measured(chromium, wide, 390, "d.documentElement.scrollWidth > 390") == "true"


def test_on_a_phone_the_results_need_no_sideways_scrolling(chromium, page):
    cut = "[...d.querySelectorAll('.pipeline-table, .benchmark table, .heat, .certificate table')]"
    cut += ".filter(t => t.parentElement.scrollWidth > t.parentElement.clientWidth + 1).length"
    assert measured(chromium, page, 390, cut) == "0"


def test_the_style_is_applied_and_follows_the_reader_into_the_dark(chromium, page):
    question = "w.getComputedStyle(d.body).backgroundColor"
    assert measured(chromium, page, 800, question, LIGHT) == "rgb(251, 250, 247)"
    assert measured(chromium, page, 800, question, DARK) == "rgb(16, 23, 28)"


def test_every_link_inside_the_page_leads_somewhere_and_no_identity_is_taken_twice(chromium, page):
    lost = "[...d.querySelectorAll('a[href^=\"#\"]')].filter(a => !d.getElementById(a.hash.slice(1))).length"
    twice = "(ids => ids.length - new Set(ids).size)([...d.querySelectorAll('[id]')].map(e => e.id))"
    nameless = "[...d.querySelectorAll('svg')].filter(s => !d.getElementById(s.getAttribute('aria-labelledby')"
    nameless += ".split(' ')[0])?.textContent).length"
    assert measured(chromium, page, 800, f"[{lost}, {twice}, {nameless}]") == "0,0,0"


def test_text_that_runs_from_the_right_is_set_from_the_right(chromium, page):
    assert fake_store.PROMPTS["ar"][0] in page
    question = "[...d.querySelectorAll('.sample dd')].filter(e => w.getComputedStyle(e).direction === 'rtl').length"
    assert measured(chromium, page, 800, question) == "2"
