"""The page: its policy, and a person's way through it in a real browser (Debian's chromium and chromium-driver)."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from places import ROOT
from told_backend import SPECIAL, Running, ToldBackend, tokenizer, waited

PAGE = ROOT / "runner" / "server" / "page"
THINKING = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}{#- enable_thinking </think> -#}"
)
ANSWER = """<think>A list, and code.</think>Some **bold** and `code`:

- one
- two

```python
print("<b>hi</b>")
```

<img src=x onerror="window.bad = 1"><script>window.bad = 1</script> [link](javascript:window.bad=1) [fine](https://x.org/)
"""


def script(prompt: str, _order: object) -> str:
    if "slowly" in prompt:
        return "slow " * 2000
    return ANSWER if "markdown" in prompt else "Hello there."


@pytest.fixture(scope="module")
def told() -> ToldBackend:
    return ToldBackend(script, facts=tokenizer(THINKING, SPECIAL), context=20_000)


@pytest.fixture(scope="module")
def server(told: ToldBackend) -> Iterator[Running]:
    with Running([told]) as running:
        yield running


def test_browsers_get_the_page_under_a_strict_policy(server: Running) -> None:
    page = httpx2.get(server.url, headers={"accept": "text/html,*/*"})
    assert page.headers["content-type"].startswith("text/html") and "<title>runner</title>" in page.text
    for name in re.findall(r'(?:src|href)="(page/[^"]+)"', page.text):
        found = httpx2.get(f"{server.url}/{name}")
        assert found.status_code == 200 and "default-src 'none'" in found.headers["content-security-policy"]
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert httpx2.get(f"{server.url}/page/../app.py").status_code == 404
    assert httpx2.get(f"{server.url}/page/%2e%2e%2fapp.py").status_code == 404


def test_the_page_is_small_and_fetches_nothing_from_elsewhere() -> None:
    text = "".join(path.read_text() for path in PAGE.iterdir())
    assert len(text) < 30_000
    assert re.findall(r"https?://[\w.]+", text) == []
    assert "innerHTML" not in text and "eval(" not in text and "document.write" not in text and "style=" not in text


class Browser:
    """A headless Chromium, by the protocol of its driver (W3C WebDriver)."""

    def __init__(self, width: int = 1100, height: int = 900) -> None:
        driver = shutil.which("chromedriver")
        assert driver is not None
        self._process = subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        found = None
        while found is None:
            line = self._process.stdout.readline()
            assert line, "the driver did not start"
            found = re.search(r"successfully on port (\d+)", line)
        self._client = httpx2.Client(base_url=f"http://127.0.0.1:{found[1]}", timeout=60)
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        arguments = ["--headless=new", "--disable-gpu", f"--window-size={width},{height}", *sandbox]
        wanted = {"alwaysMatch": {"goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"}}}
        made = self._client.post("/session", json={"capabilities": wanted}).json()
        self._session = f"/session/{made['value']['sessionId']}"

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.delete(self._session)
        self._process.terminate()
        self._process.wait(10)

    def _do(self, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self._client.post(self._session + path, json=body or {}).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def open(self, url: str) -> None:
        self._do("/url", {"url": url})

    def run(self, code: str) -> Any:
        return self._do("/execute/sync", {"script": code, "args": []})

    def keys(self, selector: str, text: str) -> None:
        element = self._do("/element", {"using": "css selector", "value": selector})
        self._do(f"/element/{next(iter(element.values()))}/value", {"text": text})

    def click(self, selector: str) -> None:
        element = self._do("/element", {"using": "css selector", "value": selector})
        self._do(f"/element/{next(iter(element.values()))}/click")

    def text(self, selector: str) -> str:
        return str(
            self.run(f"return [...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText).join('|')")
        )

    def complaints(self) -> list[str]:
        found = self._client.post(f"{self._session}/se/log", json={"type": "browser"}).json()["value"]
        return [line["message"] for line in found]

    def picture(self) -> bytes:
        return base64.b64decode(self._client.get(f"{self._session}/screenshot").json()["value"])

    def colours(self, scheme: str) -> None:
        emulated = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self._do("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": emulated})


@pytest.mark.long
@pytest.mark.skipif(shutil.which("chromedriver") is None, reason="apt install chromium chromium-driver")
def test_a_persons_way(told: ToldBackend, server: Running, tmp_path: Path) -> None:
    pictures = Path(os.environ.get("RUNNER_PICTURES", tmp_path))
    with Browser() as browser:
        browser.open(server.url)
        assert waited(lambda: browser.text("#model") == "told")
        browser.keys("#text", "Show me markdown\ue007")
        assert waited(lambda: "per second" in browser.text("article.assistant .tools"), 10)
        assert browser.text("article.assistant strong") == "bold" and browser.text("article.assistant li") == "one|two"
        assert browser.text("article.assistant pre") == 'print("<b>hi</b>")'
        assert "reused" in browser.text("article.assistant .tools")
        # Nothing that the model writes becomes a part of the page.
        assert browser.run("return window.bad") is None
        assert browser.run("return document.querySelectorAll('article img, article script, article b').length") == 0
        assert browser.run("return [...document.querySelectorAll('article a')].map(a => a.href)") == ["https://x.org/"]
        # The reasoning is folded, and opens.
        assert browser.run("return document.querySelector('details').open") is False
        browser.click("details summary")
        assert "A list, and code." in browser.text("details")
        (pictures / "page-light.png").write_bytes(browser.picture())
        browser.colours("dark")
        (pictures / "page-dark.png").write_bytes(browser.picture())
        # Regenerate gives another answer in the place of the last; edit takes a turn back.
        before = len(told.orders)
        browser.run("[...document.querySelectorAll('article.assistant button')].at(-1).click()")
        assert waited(lambda: len(told.orders) == before + 1 and "per second" in browser.text("article .tools"))
        assert browser.run("return document.querySelectorAll('article').length") == 2
        browser.run("document.querySelector('article.user button').click()")
        assert browser.run("return document.querySelectorAll('article').length") == 0
        assert browser.run("return document.getElementById('text').value") == "Show me markdown"
        # A slow answer is stopped by Escape, and its row is freed.
        browser.run("document.getElementById('text').value = ''")
        told.pause = 0.01
        browser.keys("#text", "Answer slowly\ue007")
        assert waited(lambda: "slow" in browser.text("article.assistant .body"), 10)
        browser.keys("body", "\ue00c")
        assert waited(lambda: told.open == 0) and waited(lambda: "stopped" in browser.text("article.assistant .tools"))
        told.pause = 0.0
        # Settings reach the engine, and a schema holds the answer.
        browser.click("#clear")
        browser.click("#toggle")
        browser.keys("#temperature", "0.5")
        browser.keys("#seed", "7")
        browser.keys("#system", "Be brief.")
        browser.keys("#schema", '{"type": "boolean"}')
        browser.keys("#text", "True?\ue007")
        assert waited(lambda: browser.text("article.assistant .body p") in ("true", "false"), 10)
        order = told.orders[-1]
        assert (order.params.temperature, order.params.seed) == (0.5, 7)
        assert "Be brief." in told.facts.tokenizer.decode(order.ids)
        browser.run("document.getElementById('schema').value = '{'")
        browser.keys("#text", "x\ue007")
        assert waited(lambda: "is not JSON" in browser.text("p.error"))
        assert browser.complaints() == []


@pytest.mark.long
@pytest.mark.skipif(shutil.which("chromedriver") is None, reason="apt install chromium chromium-driver")
def test_copying_and_the_keyboard_alone(told: ToldBackend) -> None:
    other = ToldBackend(script, name="other", facts=tokenizer(THINKING, SPECIAL), context=20_000)
    with Running([told, other]) as server, Browser() as browser:
        browser.open(server.url)
        assert waited(lambda: browser.text("#model").split() == ["told", "other"])
        focus = "return document.activeElement.id"
        assert browser.run(focus) == "text"
        browser.keys("#text", "\ue008\ue004\ue008")  # Shift and Tab
        assert browser.run(focus) == "toggle"
        browser.keys("#toggle", "\ue007")  # Enter opens the settings
        assert browser.run("return document.getElementById('settings').hidden") is False
        browser.keys("#model", "oth")
        browser.keys("#text", "Show me markdown\ue007")
        assert waited(lambda: "per second" in browser.text("article.assistant .tools"), 10)
        assert len(other.orders) == 1
        browser.run("document.execCommand = () => window.got = document.activeElement.value")
        for clipboard in ("{writeText: t => window.got = t}", "undefined"):
            value = f"{{configurable: true, value: {clipboard}}}"
            browser.run(f"window.got = null; Object.defineProperty(navigator, 'clipboard', {value})")
            browser.run("document.querySelector('.block button').click()")
            assert waited(lambda: browser.run("return window.got") == 'print("<b>hi</b>")')
            browser.run("document.querySelector('article.assistant .tools button').click()")
            assert waited(lambda: browser.run("return window.got") == ANSWER.partition("</think>")[2])
            assert browser.text(".block button") == "Copied"
        assert browser.complaints() == []


@pytest.mark.long
@pytest.mark.skipif(shutil.which("chromedriver") is None, reason="apt install chromium chromium-driver")
def test_on_a_phone(server: Running, tmp_path: Path) -> None:
    with Browser(420, 800) as browser:
        browser.open(server.url)
        assert waited(lambda: browser.text("#model") == "told")
        browser.keys("#text", "Show me markdown\ue007")
        assert waited(lambda: "per second" in browser.text("article.assistant .tools"), 10)
        time.sleep(0.2)
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
        (Path(os.environ.get("RUNNER_PICTURES", tmp_path)) / "page-phone.png").write_bytes(browser.picture())
