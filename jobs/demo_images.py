"""The demo's input, drawn on the spot: receipts, notes, signs, a table, a chart, a scene and one broken file."""

import io
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_ORIENTATION_TAG, _ROTATED_90 = 0x0112, 6


def demo_images() -> dict[str, bytes]:
    """Return file name → encoded image: twelve good ones and `broken.jpg`, which is cut in half."""
    images = {
        "receipt-cafe.png": _receipt("CAFE ORION", [("Espresso", 2.40), ("Croissant", 3.10), ("Orange juice", 4.20)]),
        "receipt-books.jpg": _receipt("PAGE & SON", [("Atlas", 39.00), ("Notebook", 5.50), ("Pencil", 0.90)]),
        "receipt-tools.webp": _receipt("IRON WORKS", [("Hammer", 18.75), ("Nails 200", 6.20)]),
        "note-meeting.png": _note("Meeting moved", ["Room 214, not 118.", "Tuesday, 9:30.", "Bring the figures."]),
        "note-shopping.jpg": _note("Shopping", ["6 eggs", "flour, 1 kg", "two lemons", "butter"]),
        "letter.png": _note(
            "Dear Ms. Abara,", ["thank you for your order 4471.", "It leaves on 3 March.", "Yours, R. Lind"]
        ),
        "sign-exit.png": _sign("EXIT", (20, 120, 60)),
        "sign-stop.jpg": _sign("STOP", (190, 30, 40)),
        "sign-trail.webp": _sign("TRAIL 7 km", (110, 80, 40)),
        "table-trains.png": _table([["Train", "From", "At"], ["IC 61", "Basel", "08:12"], ["RE 5", "Bern", "08:40"]]),
        "chart-rain.png": _chart([3, 7, 4, 9, 12, 8]),
        "scene.jpg": _scene(),
    }
    files = {name: _encode(image, name) for name, image in images.items()}
    whole = _encode(images["sign-stop.jpg"], "broken.jpg")
    return {**files, "broken.jpg": whole[: len(whole) // 2]}


def _encode(image: Image.Image, name: str) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    if name == "scene.jpg":
        # Stored on its side, as cameras do; the tag says how to turn it back.
        image, exif[_ORIENTATION_TAG] = image.transpose(Image.Transpose.ROTATE_90), _ROTATED_90
    image.save(buffer, _FORMATS[name.rpartition(".")[2]], exif=exif)
    return buffer.getvalue()


def _paper(width: int, height: int, color: str = "white") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), color)
    return image, ImageDraw.Draw(image)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _receipt(shop: str, items: list[tuple[str, float]]) -> Image.Image:
    image, draw = _paper(300, 190 + 32 * len(items))
    draw.text((150, 30), shop, "black", _font(28), anchor="mm")
    lines = [*items, ("TOTAL", sum(price for _, price in items))]
    for index, (name, price) in enumerate(lines):
        y = 80 + 32 * index + (14 if name == "TOTAL" else 0)
        draw.text((24, y), name, "black", _font(20))
        draw.text((276, y), f"{price:.2f}", "black", _font(20), anchor="ra")
    draw.line((24, 84 + 32 * len(items), 276, 84 + 32 * len(items)), "black", 2)
    return image


def _note(title: str, lines: list[str]) -> Image.Image:
    image, draw = _paper(420, 90 + 44 * len(lines), "#fff6c9")
    draw.text((24, 20), title, "#20304a", _font(30))
    for index, line in enumerate(lines):
        draw.text((24, 76 + 44 * index), line, "#20304a", _font(24))
    return image


def _sign(text: str, color: tuple[int, int, int]) -> Image.Image:
    image, draw = _paper(440, 260, "#9db4c8")
    draw.rounded_rectangle((40, 50, 400, 210), 24, fill=color, outline="white", width=6)
    draw.text((220, 130), text, "white", _font(60), anchor="mm")
    return image


def _table(rows: list[list[str]]) -> Image.Image:
    image, draw = _paper(400, 30 + 48 * len(rows))
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            draw.rectangle((20 + 120 * x, 15 + 48 * y, 140 + 120 * x, 63 + 48 * y), outline="gray")
            draw.text((32 + 120 * x, 26 + 48 * y), cell, "black", _font(22))
    return image


def _chart(values: list[int]) -> Image.Image:
    image, draw = _paper(420, 300)
    draw.text((210, 24), "Rain per month (cm)", "black", _font(22), anchor="mm")
    for index, value in enumerate(values):
        x = 40 + 60 * index
        draw.rectangle((x, 260 - 16 * value, x + 40, 260), fill="#3572b0")
        draw.text((x + 20, 276), "JFMAMJ"[index], "black", _font(18), anchor="mm")
    return image


def _scene() -> Image.Image:
    """Hills under an evening sky, with the grain of a photograph."""
    shade = np.linspace(0, 1, 320)[:, None, None]
    sky = (1 - shade) * np.array([70, 110, 180]) + shade * np.array([250, 170, 110])
    grain = np.random.default_rng(0).normal(0, 6, (320, 480, 3))
    image = Image.fromarray(np.clip(sky + grain, 0, 255).astype(np.uint8))
    draw, dice = ImageDraw.Draw(image), random.Random(0)
    draw.ellipse((330, 60, 390, 120), fill="#ffe9a8")
    for layer, color in enumerate(("#5b7a6b", "#3e5c4e", "#263d33")):
        ridge = [(x, 200 + 40 * layer + dice.randint(-18, 18)) for x in range(0, 481, 40)]
        draw.polygon([(0, 320), *ridge, (480, 320)], fill=color)
    return image
