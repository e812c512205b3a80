"""Headless Chromium, driven by selenium."""

import shutil
from pathlib import Path
from typing import Any


class Browser:
    """Headless Chromium that can reach only this machine."""

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
        """Set the page's size in CSS pixels; a narrow page is that of a phone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def console(self) -> list[str]:
        """Console messages since the last call: output of pages, errors, failed requests."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def find_all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def color_scheme(self, scheme: str) -> None:
        """Set prefers-color-scheme to light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def outside(self, selector: str) -> list[str]:
        """Visible elements whose box is empty or extends beyond the page's width."""
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
        """Screenshot of the first matching element, saved to `path`, as a PIL image."""
        from PIL import Image

        path.write_bytes(self.find(selector).screenshot_as_png)
        return Image.open(path).convert("RGB")
