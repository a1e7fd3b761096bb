"""The page in a browser, where Chromium and Playwright are installed."""

import shutil

import pytest
from support.serving import running_server

from gircse.runtime import Embedder
from gircse.serving.http_app import ServerOptions, create_app

CHROMIUM = shutil.which("chromium")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("keys", [(), ("secret",)], ids=["open", "key"])
def test_two_texts_are_compared(keys: tuple[str, ...], embedder: Embedder) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    app = create_app(embedder, ServerOptions(model="small", api_keys=keys))
    with running_server(app) as address, playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        if keys:
            page.fill("#key", keys[0])  # asked for, because /v1/models was refused
        else:
            assert not page.is_visible("#key")
        page.fill("#first", "a bird")
        page.fill("#second", "old ships")
        page.fill("#instruction", "Find")
        page.click("button")
        page.wait_for_selector("#result:not([hidden])")
        cosine = float(embedder.encode("a bird", instruction="Find") @ embedder.encode("old ships"))
        assert float(page.text_content("#cosine")) == pytest.approx(cosine, abs=1e-4)
        assert page.locator("#chart circle").count() == 5
        assert not page.is_visible("#error")
        assert not errors
        browser.close()
