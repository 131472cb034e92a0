"""What a person does on the endpoint's page, and what they see, in Chromium."""

import base64
import io
import json
from urllib.parse import urlsplit

from chromium import logged
from local_gateway import png
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

DROP = """
const [files, event, target] = arguments;
const carried = new DataTransfer();
for (const [name, type, data] of files) {
  carried.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type }));
}
const about = { bubbles: true, cancelable: true, dataTransfer: carried, clipboardData: carried };
target.dispatchEvent(event === "drop" ? new DragEvent(event, about) : new ClipboardEvent(event, about));
"""
Picture = tuple[str, str, str]  # name, type, base64


class Browser:
    """The page in a driven browser."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str, width: int = 1280, height: int = 860, scheme: str = "light") -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme_feature]})
        self.driver.get(f"{url}/")

    def give(self, *pictures: Picture, event: str = "drop") -> None:
        self.driver.execute_script(DROP, pictures, event, self.one("body"))

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def click(self, selector: str) -> None:
        self.one(selector).click()

    def text(self, selector: str) -> str:
        return self.one(selector).text

    def wait_for(self, selector: str, text: str) -> None:
        WebDriverWait(self.driver, 60, 0.02).until(
            lambda _: text in " ".join(each.text for each in self.all(selector)),
            f"{selector} never showed {text!r}",
        )

    def wait_until_answered(self) -> None:
        WebDriverWait(self.driver, 60, 0.02).until(lambda _: self.all("article") and not self.all("[aria-busy]"))

    def costs(self) -> dict[str, str]:
        """The numbers under the newest answer by their names."""
        newest = self.one("article")
        names, values = (newest.find_elements(By.TAG_NAME, tag) for tag in ("dt", "dd"))
        return {name.text: value.text for name, value in zip(names, values, strict=True)}

    def console(self) -> list[str]:
        """What the page complained of, favicon and policy included."""
        entries = logged(self.driver, "browser")
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def hosts(self) -> set[str]:
        """Every host that any request of this page went to."""
        messages = (json.loads(entry["message"])["message"] for entry in logged(self.driver, "performance"))
        sent = (each["params"] for each in messages if each["method"] == "Network.requestWillBeSent")
        urls = [urlsplit(each["request"]["url"]) for each in sent if each["documentURL"].startswith("http")]
        return {url.netloc for url in urls if url.scheme not in ("data", "blob")}

    def screenshot(self) -> Image.Image:
        return Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")


def picture(name: str = "cats.png", size: tuple[int, int] = (160, 120), color: str = "teal") -> Picture:
    """A picture of one colour, as it is given to the page."""
    return name, "image/png", base64.b64encode(png(*size, color)).decode()
