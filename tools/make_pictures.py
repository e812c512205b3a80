"""Take the pictures of README.md: the top of the report, and a question answered on the side-by-side page.

    python tools/make_pictures.py                                docs/images/report.png, from reports/report.html
    python tools/make_pictures.py --page http://127.0.0.1:7860   docs/images/page.png as well, from a running `make ui`

Run it after `make repro` of the default profile, once its results are committed. Needs chromium and chromedriver.

Reads   reports/report.html, artifacts/prepared/test.jsonl (the first row is the question)
Writes  docs/images/report.png, docs/images/page.png
"""

import base64
import shutil
from pathlib import Path
from typing import Any

from trnlora import paths
from trnlora.cli import script_parser
from trnlora.data.examples import read_examples
from trnlora.errors import UserError, run
from trnlora.files import atomic_file

WIDTH = 1200  # CSS pixels, and pixels of the picture
REPORT_HEIGHT = 820  # CSS pixels of the report, without its list of versions
ANSWER_SECONDS = 300  # within which all models must have answered


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--report", type=Path, default=Path("reports/report.html"), metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument("--page", metavar="URL", help="address of a running `make ui`")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/images"), metavar="DIR", help="output folder (default: %(default)s)"
    )
    args = parser.parse_args()
    if not args.report.is_file():
        raise UserError(f"{args.report} is missing: run `make report`")
    driver = start_browser()
    try:
        driver.get(args.report.absolute().as_uri())
        driver.execute_script("document.getElementById('run').hidden = true")
        write_picture(driver, args.out / "report.png", REPORT_HEIGHT)
        if args.page:
            ask(driver, args.page)
            height = driver.execute_script("return document.querySelector('main').getBoundingClientRect().height")
            write_picture(driver, args.out / "page.png", int(height))
    finally:
        driver.quit()


def start_browser() -> Any:
    """Headless Chromium, in light colours, that reaches this machine only."""
    from selenium import webdriver

    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        raise UserError("chromium and chromedriver are missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    hosts = "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars", hosts):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    metrics = {"width": WIDTH, "height": REPORT_HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    light = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", light)
    return driver


def ask(driver: Any, url: str) -> None:
    """Ask all models of the page the first test row, and wait until they have answered.

    Raises UserError if the page or a model reports an error, or if the answers take longer than ANSWER_SECONDS.
    """
    from selenium.common.exceptions import TimeoutException, WebDriverException
    from selenium.webdriver.support.ui import WebDriverWait

    row = read_examples(paths.PREPARED / "test.jsonl")[0]
    wait = WebDriverWait(driver, ANSWER_SECONDS)

    def enabled(_: Any) -> bool:  # once the models are known, and again when all of them have answered
        return bool(problem(driver)) or find("#ask").is_enabled()

    def find(selector: str) -> Any:
        return driver.find_element("css selector", selector)

    try:
        driver.get(url)
        wait.until(enabled)
        find("#instruction").send_keys(row["messages"][-2]["content"])
        find("#context").send_keys(row["messages"][-2]["context"])
        find("#ask").click()
        wait.until(enabled)
    except (TimeoutException, WebDriverException) as error:
        line = str(error).partition("\n")[0].removeprefix("Message: ") or f"no answer within {ANSWER_SECONDS} s"
        raise UserError(f"{url}: {line}: start `make ui` and name its address") from None
    if text := problem(driver):
        raise UserError(f"{url}: {text}")


def problem(driver: Any) -> str:
    """The first error that the page shows, or an empty string."""
    return next((found.text for found in driver.find_elements("css selector", ".error") if found.text), "")


def write_picture(driver: Any, target: Path, height: int) -> None:
    """Write the top `height` CSS pixels of the page as a PNG file."""
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 1}
    arguments = {"captureBeyondViewport": True, "clip": clip}
    image = base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", arguments)["data"])
    with atomic_file(target) as partial:
        partial.write_bytes(image)
    print(f"{target}: {len(image) / 1024:.0f} KiB")


if __name__ == "__main__":
    run(main)
