"""Headless Chromium, driven by selenium."""

import shutil
from pathlib import Path
from typing import Any


class Browser:
    """Headless Chromium that can reach this machine alone."""

    def __init__(self) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        for argument in (
            "headless=new",
            "no-sandbox",
            "disable-gpu",
            "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        options.binary_location = shutil.which("chromium") or ""
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))

    def resize(self, width: int, height: int = 900) -> None:
        """The page's size in CSS pixels; a narrow one is a phone's."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def console(self) -> list[str]:
        """What pages have written to the console since the last call: messages, errors, requests that failed."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def find_all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def color_scheme(self, scheme: str) -> None:
        """What pages see as prefers-color-scheme: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def outside(self, selector: str) -> list[str]:
        """Elements that are shown and whose box is empty or not within the page's width."""
        script = """
            const width = document.documentElement.clientWidth;
            return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).filter(e => {
              const box = e.getBoundingClientRect();
              return box.width < 1 || box.height < 1 || box.left < 0 || box.right > width + 0.5;
            }).map(e => e.outerHTML.slice(0, 100));
        """
        outside: list[str] = self.driver.execute_script(script, selector)
        return outside

    def picture(self, selector: str, path: Path) -> Any:
        """The first element that matches, as a PIL image, kept in `path`."""
        from PIL import Image

        path.write_bytes(self.find(selector).screenshot_as_png)
        return Image.open(path).convert("RGB")
