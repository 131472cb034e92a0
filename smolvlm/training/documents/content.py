"""What stands on a document: rows of cells, before anything is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from smolvlm.training.documents.vocabulary import belongs
from smolvlm.training.documents.writer import Writer

Align = Literal["left", "center", "right", "both"]
Rules = Literal["none", "grid", "lines", "frame", "dashes"]


@dataclass(frozen=True)
class Cell:
    """Text within a share of the row's width; `start` and `end` run from 0 to 1."""

    text: str
    align: Align = "left"
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Row:
    """A visual line: cells from left to right that do not reach into each other.

    has_rule: whether a rule may be drawn under it. gap: room above it in lines of body text.
    """

    cells: tuple[Cell, ...]
    is_heading: bool = False
    has_rule: bool = False
    gap: float = 0.0

    @property
    def text(self) -> str:
        return " ".join(cell.text for cell in self.cells)


@dataclass(frozen=True)
class Space:
    """How much may be written: characters in a row, rows, characters in all."""

    columns: int
    rows: int
    chars: int


@dataclass(frozen=True)
class Content:
    """The rows of a document from top to bottom, and the kind of rules drawn around them."""

    rows: tuple[Row, ...]
    rules: Rules = "none"


def write(kind: str, writer: Writer, space: Space) -> Content:
    """Write a document of the kind into the space; where it is too narrow for any row of the kind, one short word."""
    content = WRITE[kind](writer, space)
    rows = [row for row in content.rows if len(row.text) <= space.columns]
    return Content(tuple(_within(rows or _rows([_short(writer, space.columns)]), space)), content.rules)


def _within(rows: Iterable[Row], space: Space) -> Iterable[Row]:
    """Keep the rows that the space has room for; a first row too long is cut at a word or, failing that, a letter."""
    left = space.chars
    for number, row in enumerate(rows):
        if number == space.rows or (number and len(row.text) > left):
            return
        if len(row.text) > left:
            row = Row((Cell(row.text[:left].rpartition(" ")[0] or row.text[:3], row.cells[0].align),))
        left -= len(row.text) + 1
        yield row


def wrap(tokens: Iterable[str], space: Space) -> list[str]:
    """Fill lines of at most `space.columns` characters until the space is full or the tokens end; a token too long for
    a line is left out unless it would be the only one."""
    lines: list[str] = []
    line, used = "", 0
    for token in tokens:
        for piece in token.split(" "):
            if len(piece) > space.columns:
                continue
            used += len(piece) + 1
            if used > space.chars + 1:
                return [*lines, line] if line else lines
            if len(line) + len(piece) + bool(line) > space.columns:
                lines, line = [*lines, line], ""
                if len(lines) == space.rows:
                    return lines
            line = f"{line} {piece}" if line else piece
    return [*lines, line] if line else lines


def _rows(lines: Iterable[str], align: Align = "left") -> tuple[Row, ...]:
    return tuple(Row((Cell(line, align),)) for line in lines)


def _pair(left: str, right: str, space: Space) -> Row:
    """Set one text at the left edge and one at the right, the border where their lengths meet."""
    border = min(max(1 - (len(right) + 1.5) / max(space.columns, len(left) + len(right) + 2), 0.2), 0.9)
    return Row((Cell(left, "left", 0.0, border), Cell(right, "right", border, 1.0)))


def _short(writer: Writer, longest: int) -> str:
    return writer.cased(max(longest, 1))


def word(writer: Writer, space: Space) -> Content:
    text = writer.token().split(" ")[0]
    if len(text) > space.columns:
        text = _short(writer, space.columns)
    return Content(_rows([text], "center"))


def line(writer: Writer, space: Space) -> Content:
    lines = wrap(_phrase(writer), Space(space.columns, min(space.rows, writer.random.randint(1, 2)), space.chars))
    return Content(_rows(lines or [_short(writer, space.columns)], writer.random.choice(("left", "center"))))


def _phrase(writer: Writer) -> list[str]:
    style = writer.random.random()
    if style < 0.4:
        return writer.sentence()
    count = writer.random.randint(1, 6)
    if style < 0.7:
        return [writer.token() for _ in range(count)]
    casing = writer.random.choice((str.upper, str.capitalize, str.lower))
    return [casing(writer.word()) for _ in range(count)]


def paragraph(writer: Writer, space: Space) -> Content:
    rows = writer.random.randint(min(3, space.rows), min(space.rows, 8))
    tokens = [token for _ in range(rows) for token in writer.sentence()]
    lines = wrap(tokens, Space(space.columns, rows, space.chars)) or [_short(writer, space.columns)]
    align: Align = writer.random.choice(("left", "left", "left", "both", "both", "center", "right"))
    body = (*_rows(lines[:-1], "both"), *_rows(lines[-1:])) if align == "both" else _rows(lines, align)
    return Content((*_paragraph_title(writer, align), *body))


def _paragraph_title(writer: Writer, align: Align) -> tuple[Row, ...]:
    if writer.random.random() < 0.75:
        return ()
    title = writer.title(writer.random.randint(1, 3), 10)
    return (Row((Cell(title, "left" if align == "both" else align),), is_heading=True),)


def dense(writer: Writer, space: Space) -> Content:
    count = space.columns * space.rows // 3 + 1
    noise = writer.random.choice((0.2, 0.5, 0.9))
    tokens = [writer.noise() if writer.random.random() < noise else writer.token() for _ in range(count)]
    return Content(_rows(wrap(tokens, space) or [_short(writer, space.columns)]))


# "Total" is held out: what training sees of it are its relatives, without which "TO" is only ever read before "PAY".
TOTALS = (
    "TOTAL", "Total", "SUM", "Sum", "AMOUNT DUE", "Due", "TO PAY", "Balance", "GRAND TOTAL", "Net", "TOTALS", "Totals",
    "SUBTOTAL", "Subtotal",
)  # fmt: skip


def receipt(writer: Writer, space: Space) -> Content:
    fitting = min(space.rows, space.chars // (space.columns + 1)) - 2  # beside the shop and the total
    items, total = _items(writer, max(1, min(fitting, writer.random.randint(2, 7))))
    currency = writer.random.choice(("", "", "$", "£", "€"))
    shown = [_pair(_item_name(writer, space, len(currency + price)), currency + price, space) for price in items]
    labels = [label for label in TOTALS if len(label) + len(currency + total) < space.columns] or ["SUM"]
    due = Row(_pair(writer.pick(*labels), currency + total, space).cells, is_heading=True)
    needed = [_shop(writer, space), *shown, due]
    details, tail = _receipt_details(writer, space), _receipt_tail(writer, space)
    while (details or tail) and not _fit([*needed, *details, *tail], space):
        (tail or details).pop()
    blocks = [[needed[0], *details], shown, [due], tail]
    return Content(_apart(writer, blocks), writer.random.choice(("none", "dashes", "lines", "lines")))


def _apart(writer: Writer, blocks: list[list[Row]]) -> tuple[Row, ...]:
    """Set blocks of rows one below the other, some with a rule under them, some with room above."""
    rows: list[Row] = []
    for first, *others in filter(None, blocks):
        gap = writer.random.uniform(0.2, 0.9) if rows and writer.random.random() < 0.5 else 0.0
        rows += [replace(first, gap=gap), *others]
        rows[-1] = replace(rows[-1], has_rule=writer.random.random() < 0.6)
    return tuple(rows)


def _fit(rows: list[Row], space: Space) -> bool:
    return len(rows) <= space.rows and sum(len(row.text) + 1 for row in rows) <= space.chars + 1


def _shop(writer: Writer, space: Space) -> Row:
    kinds = ("SHOP", "CAFE", "STORE", "BAR", "MARKET", "& Co", "INN", "Books", "Deli", "Foods", "& Son", "LTD")
    name = f"{writer.title(1, 9)} {writer.pick(*kinds)}"
    text = name.upper() if writer.random.random() < 0.5 else name
    fits = text if len(text) <= space.columns else _short(writer, space.columns)
    return Row((Cell(fits, "center"),), is_heading=True)


def _receipt_details(writer: Writer, space: Space) -> list[Row]:
    streets = ("Street", "Road", "Ave", "St", "Lane", "Rd", "Way", "Blvd")
    details = [
        _pair(writer.date(), writer.time(), space),
        Row((Cell(f"{writer.random.randint(1, 199)} {writer.title(1, 9)} {writer.pick(*streets)}", "center"),)),
        Row((Cell(f"{writer.pick('Tel', 'Phone', 'Call')} {writer.phone()}", "center"),)),
        _pair(writer.pick("Order", "No", "Receipt", "Ref", "Table", "Bon", "Invoice"), writer.code(), space),
    ]
    chosen = [details[0], *writer.random.sample(details[1:], writer.random.randint(0, 2))]
    return [row for row in chosen if len(row.text) <= space.columns]


def _receipt_tail(writer: Writer, space: Space) -> list[Row]:
    ends: tuple[Callable[[], Row], ...] = (
        lambda: _pair(writer.pick("VAT", "TAX", "Sales tax", "Tip", "Service"), writer.price(20), space),
        lambda: _pair(writer.pick("CASH", "CARD", "VISA", "PIN", "Change", "Paid"), writer.price(), space),
        lambda: Row(
            (Cell(writer.pick("Thank you!", "THANK YOU", "Come again", "See you", "Bye!", "Visit us"), "center"),)
        ),
        lambda: Row((Cell(writer.url(), "center"),)),
    )
    rows = [end() for end in writer.random.sample(ends, writer.random.randint(0, 2))]
    return [row for row in rows if len(row.text) <= space.columns]


def _items(writer: Writer, count: int) -> tuple[list[str], str]:
    """Draw prices whose sum is a number of the split as well."""
    while True:
        prices = [writer.price(40) for _ in range(count)]
        total = f"{sum(map(float, prices)):.2f}"
        if belongs(total, writer.split):
            return prices, total


def _item_name(writer: Writer, space: Space, taken: int) -> str:
    room = max(space.columns - taken - 2, 1)
    amount = writer.random.choice(("", "", f"{writer.random.randint(1, 9)} x ", f"{writer.random.randint(1, 5)} "))
    amount = amount if len(amount) + 6 < room else ""
    name = writer.word(min(room - len(amount), 12))
    if (left := room - len(amount) - len(name) - 1) > 2 and writer.random.random() < 0.6:
        name = f"{name} {writer.word(min(left, 10))}"
    name = writer.random.choice((name.capitalize(), name, name.upper()))
    measured = f"{name} {writer.quantity()}"
    return measured if not amount and len(measured) <= room and writer.random.random() < 0.4 else amount + name


def form(writer: Writer, space: Space) -> Content:
    fields: tuple[Callable[[], tuple[str, str]], ...] = (
        lambda: (writer.pick("Name", "Full name", "Mr", "Contact"), writer.name()),
        lambda: (writer.pick("Date", "Day", "Born", "DOB", "Issued"), writer.date()),
        lambda: (writer.pick("Phone", "Tel", "Mobile", "Fax"), writer.phone()),
        lambda: (writer.pick("Email", "E-mail", "Web", "Mail"), writer.email()),
        lambda: (writer.pick("Ref", "ID", "Number", "Code", "Account", "No"), writer.code()),
        lambda: (writer.pick("City", "Town", "Country", "In", "Place"), writer.title(1)),
        lambda: (writer.pick("Amount", "Fee", "Price", "Cost", "Sum"), writer.money()),
        lambda: (writer.pick("Job", "Title", "Type", "Class", "Use"), writer.title(1)),
    )
    mark = writer.random.choice((":", ":", "", "."))
    chosen = [field() for field in writer.random.sample(fields, len(fields))]
    width = max(len(label) for label, _ in chosen) + 2
    share = min(width / max(space.columns, width + 4), 0.5)
    rows = [
        Row((Cell(label + mark, "left", 0.0, share), Cell(value, "left", share, 1.0)), has_rule=True)
        for label, value in chosen
        if len(value) <= space.columns * (1 - share)
    ][: writer.random.randint(2, len(fields))]
    title = Row((Cell(writer.title(1, 10).upper(), "center"),), is_heading=True)
    return Content((title, *rows) if rows else (title,), writer.random.choice(("lines", "none", "frame", "dashes")))


def table(writer: Writer, space: Space) -> Content:
    count = min(writer.random.randint(2, 4), max(space.columns // 6, 1))
    room = max(space.columns // count - 1, 3)
    numeric = [bool(column) and writer.random.random() < 0.6 for column in range(count)]
    rows = writer.random.randint(min(3, space.rows), min(space.rows, 8))

    def cells(draw: Callable[[bool], str]) -> tuple[Cell, ...]:
        return tuple(
            Cell(draw(kind), "right" if kind else "left", column / count, (column + 1) / count)
            for column, kind in enumerate(numeric)
        )

    header = Row(cells(lambda _: writer.word(room).capitalize()), is_heading=True, has_rule=True)
    body = [
        Row(cells(lambda kind: _figure(writer, room) if kind else _entity(writer, room)), has_rule=True)
        for _ in range(rows - 1)
    ]
    return Content((header, *body), writer.random.choice(("grid", "lines", "none", "frame")))


def _entity(writer: Writer, room: int) -> str:
    """Draw a word or, where there is room, at times two, or one with a number."""
    name = _short(writer, room)
    second = writer.cased(4) if writer.random.random() < 0.5 else str(writer.random.randint(1, 999))
    longer = f"{name} {second}"
    return longer if len(longer) <= room and writer.random.random() < 0.3 else name


def _figure(writer: Writer, room: int) -> str:
    for _ in range(4):
        text = writer.random.choice((writer.number, writer.price, writer.money, writer.time))()
        if len(text) <= room and " " not in text:
            return text
    return str(writer.random.randint(0, 999))


def sign(writer: Writer, space: Space) -> Content:
    casing = writer.random.choice((str.upper, str.upper, str.capitalize))
    words = [casing(writer.word(max(min(space.columns, 10), 3))) for _ in range(writer.random.randint(1, 6))]
    if writer.random.random() < 0.4:
        words.append(writer.random.choice((writer.number, writer.money, writer.time, writer.quantity))())
    lines = wrap(words, Space(space.columns, min(space.rows, 4), space.chars)) or [_short(writer, space.columns)]
    return Content(_rows(lines, "center"), writer.random.choice(("frame", "none", "none")))


def screenshot(writer: Writer, space: Space) -> Content:
    heading = Row((Cell(writer.title(1, min(space.columns, 12)), "left"),), is_heading=True, has_rule=True)
    rows = [_entry(writer, space) for _ in range(2 * space.rows)]
    fitting = [row for row in rows if len(row.text) <= space.columns][: writer.random.randint(1, 8)]
    return Content((heading, *fitting), writer.random.choice(("none", "lines", "frame")))


def _entry(writer: Writer, space: Space) -> Row:
    labels = ("OK", "Save", "Open", "Cancel", "Edit", "Help", "File", "View", "Log in", "Off", "On", "Settings", "New")
    forms: tuple[Callable[[], Row], ...] = (
        lambda: _pair(writer.cased(10), writer.pick(*labels), space),
        lambda: Row((Cell(writer.url()),)),
        lambda: Row((Cell(writer.email()),)),
        lambda: _pair(writer.word(12).capitalize(), writer.time(), space),
        lambda: _pair(
            f"{writer.word(8)}_{writer.word(6)}.{writer.pick('txt', 'py', 'csv', 'md')}",
            f"{writer.random.randint(1, 999)} KB",
            space,
        ),
        lambda: Row((Cell((wrap(writer.sentence(), space) or [_short(writer, space.columns)])[0]),)),
        lambda: Row((Cell(f"{writer.word(8)} = {writer.random.choice((writer.number, writer.quoted))()}"),)),
        lambda: Row((Cell(f"> {writer.word(8)} {writer.pick('-a', '-v', '--all', '-x')} {writer.word(8)}"),)),
    )
    return writer.random.choice(forms)()


WRITE: dict[str, Callable[[Writer, Space], Content]] = {
    "word": word, "line": line, "paragraph": paragraph, "receipt": receipt, "form": form, "table": table, "sign": sign,
    "screenshot": screenshot, "dense": dense,
}  # fmt: skip
