"""Draws words, numbers and sentences that belong to one split."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from smolvlm.training.documents.options import Split
from smolvlm.training.documents.vocabulary import CHARACTERS, SHORTEST_UNIT, belongs, names, own, short_words, words

COMMONNESS = 2  # rank = size * u**COMMONNESS: the commonest words often, the rare ones not seldom
SHORT_SHARE = 0.3
UNITS = ("kg", "g", "l", "ml", "cm", "mm", "m", "km", "km/h", "oz", "lb", "pcs", "min", "h")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
DOMAINS = ("com", "org", "net", "io", "co.uk", "fr", "de", "eu")
CURRENCIES = ("$", "$", "£", "€")
CASINGS = (str.lower, str.lower, str.lower, str.capitalize, str.capitalize, str.upper)


@dataclass(frozen=True)
class Writer:
    """The vocabulary of a split and the random numbers of a document."""

    random: Random
    split: Split

    def own(self, draw: Callable[[], str]) -> str:
        """Draw until the text belongs to the split: one in five does where that is the held-out one."""
        while not belongs(text := draw(), self.split):
            pass
        return text

    def pick(self, *choices: str) -> str:
        return self.random.choice(own(choices, self.split))

    def word(self, longest: int = 14) -> str:
        """Draw a word of at most `longest` letters, in lower case; the short ones are as frequent in both splits."""
        while True:
            pool = short_words() if longest < SHORTEST_UNIT or self.random.random() < SHORT_SHARE else words(self.split)
            word = pool[int(len(pool) * self.random.random() ** COMMONNESS)]
            if len(word) <= longest:
                return word

    def cased(self, longest: int = 14) -> str:
        return self.random.choice(CASINGS)(self.word(longest))

    def title(self, count: int, longest: int = 14) -> str:
        return " ".join(self.word(longest).capitalize() for _ in range(count))

    def name(self) -> str:
        first, last = names(self.split)
        return f"{self.random.choice(first)} {self.random.choice(last)}"

    def digits(self, count: int) -> str:
        return "".join(self.random.choices(string.digits, k=count))

    def number(self) -> str:
        return self.own(self._number)

    def _number(self) -> str:
        count = self.random.randint(1, 7)
        form = self.random.choice(("{}", "{}", "{:,}", "{}%", "#{}", "-{}", "{}°", "({})", "+{}"))
        return form.format(int(self.digits(count)))

    def price(self, most: float = 200.0) -> str:
        return self.own(lambda: f"{most * self.random.random() ** 2 + 0.05:.2f}")

    def money(self) -> str:
        currency = self.random.choice(CURRENCIES)
        return self.own(lambda: f"{currency}{2000 * self.random.random() ** 3 + 1:,.2f}")

    def quantity(self) -> str:
        amount = self.random.choice((self.random.randint(1, 12), self.random.randint(1, 99) * 10, 0.5, 1.5))
        return f"{amount} {self.random.choice(UNITS)}"

    def date(self) -> str:
        return self.own(self._date)

    def _date(self) -> str:
        day, month, year = self.random.randint(1, 28), self.random.randint(1, 12), self.random.randint(1980, 2039)
        forms = (
            f"{day:02}/{month:02}/{year}", f"{year}-{month:02}-{day:02}", f"{day:02}.{month:02}.{year}",
            f"{month}/{day}/{year % 100:02}", f"{day} {MONTHS[month - 1]} {year}", f"{MONTHS[month - 1]} {day}, {year}",
        )  # fmt: skip
        return self.random.choice(forms)

    def time(self) -> str:
        return self.own(self._time)

    def _time(self) -> str:
        hour, minute = self.random.randint(0, 23), self.random.randint(0, 59)
        forms = (f"{hour:02}:{minute:02}", f"{hour % 12 + 1}:{minute:02} {'PM' if hour > 11 else 'AM'}")
        return self.random.choice((*forms, f"{hour:02}:{minute:02}:{self.random.randint(0, 59):02}"))

    def code(self) -> str:
        return self.own(self._code)

    def _code(self) -> str:
        alphabet = string.ascii_uppercase + string.digits * 2
        parts = [self.random.choices(alphabet, k=self.random.randint(2, 4)) for _ in range(self.random.randint(1, 3))]
        return self.random.choice("--/._:").join("".join(part) for part in parts)

    def phone(self) -> str:
        forms = ("({}) {}-{}", "+{} {} {}", "{}-{}-{}", "{} {} {}")
        return self.own(lambda: self.random.choice(forms).format(self.digits(3), self.digits(3), self.digits(4)))

    def email(self) -> str:
        user = (
            self.word(10) if self.random.random() < 0.5 else f"{self.word(8)}{self.random.choice('._-')}{self.word(6)}"
        )
        return f"{user}@{self.word(8)}.{self.random.choice(DOMAINS)}"

    def url(self) -> str:
        return self.own(self._url)

    def _url(self) -> str:
        start = self.pick("www.", "https://", "http://", "ftp://", "")
        end = self.random.choice(("", "", f"/{self.word(8)}", f"/{self.word(6)}?id={self.random.randint(1, 999)}"))
        return f"{start}{self.word(9)}.{self.random.choice(DOMAINS)}{end}"

    def token(self) -> str:
        """Draw a word in some case, a number, price, date, time, code, mail address or telephone number."""
        if self.random.random() < 0.6:
            return self.cased()
        draws = (self.number, self.money, self.date, self.time, self.code, self.phone, self.email, self.price, self.url)
        return self.random.choice(draws)()

    def noise(self) -> str:
        """Draw characters of any kind that spell nothing: what can only be read, not guessed."""
        return self.own(self._noise)

    def _noise(self) -> str:
        letters = self.random.choice((string.ascii_letters, string.ascii_letters + string.digits, CHARACTERS))
        return "".join(self.random.choices(letters, k=self.random.randint(1, 8)))

    def sentence(self) -> list[str]:
        """Draw the words of a sentence with its punctuation; at times a number, name or quotation stands in it."""
        tokens = [self._within_sentence() for _ in range(self.random.randint(3, 12))]
        tokens[0] = tokens[0][:1].upper() + tokens[0][1:]
        for place in range(len(tokens) - 1):
            if self.random.random() < 0.08:
                tokens[place] += self.random.choice(",,,;:")
        tokens[-1] += self.random.choice((".", ".", ".", ".", "!", "?", "..."))
        return tokens

    def _within_sentence(self) -> str:
        chance = self.random.random()
        if chance < 0.84:
            return self.word()
        draws = (self.number, self.money, self.date, self.time, self.name, self.quoted, self.cased, self.code)
        return self.random.choice(draws)()

    def quoted(self) -> str:
        left, right = self.random.choice(('""', "''", "()", "[]", "<>", "**"))
        return f"{left}{self.word()}{right}"
