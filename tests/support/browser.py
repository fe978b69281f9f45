"""A real browser without a window, which reaches no network by itself."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import JavascriptException
from selenium.webdriver.support.wait import WebDriverWait

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


@contextlib.contextmanager
def chromium(width: int = 1280, height: int = 900) -> Iterator[webdriver.Chrome]:
    """A browser that keeps what pages write to the console, and their requests."""
    with tempfile.TemporaryDirectory(prefix="aspo_browser_", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            yield driver
        finally:
            driver.quit()


def visit(driver: webdriver.Chrome, page: Path) -> None:
    """Opens a page from a file; when it returns, its scripts have run.

    On a busy machine ``driver.get`` can return while the page before is still there.
    """
    driver.execute_script("window.left = true")
    driver.get(page.as_uri())
    arrived = "return !window.left && document.readyState === 'complete'"
    wait = WebDriverWait(driver, 60, ignored_exceptions=[JavascriptException])  # of a page that is going
    wait.until(lambda driver: driver.execute_script(arrived))


def emulate(driver: webdriver.Chrome, *, scheme: str = "light", width: int | None = None) -> None:
    """A colour scheme, and a screen as wide as a phone's, say."""
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    if width is None:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    else:
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_async_script("requestAnimationFrame(arguments[0])")  # pages are told of it before the next frame
