"""A plan for a person: tables and histograms as wide as a terminal."""

from collections.abc import Mapping

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from jobs.plan import Plan, histogram, to_json, total_bytes
from jobs.progress import duration

_BAR_CHARS = 40
_MOST_BARS = 12


def print_plan(plan: Plan, console: Console) -> None:
    """Print all of it."""
    console.print(Group(_source(plan), *_histograms(plan), _outlook(plan)))


def _source(plan: Plan) -> Table:
    content = to_json(plan)
    table = _facts()
    about = "about " if content["bytes_are_estimated"] else ""
    table.add_row("images", f"{plan.survey.images:,} ({about}{total_bytes(plan) / 1e9:,.3g} GB)")
    table.add_row("sample", f"{len(plan.sample.images):,} images read and decoded")
    table.add_row("formats", ", ".join(f"{name} {share:.0%}" for name, share in content["formats"].items()))
    table.add_row("pixels", _pixels(plan))
    codes = ", ".join(f"{code} {count:,}" for code, count in content["errors_by_code"].items())
    table.add_row("bad", f"{content['bad_share']:.2%}" + (f" ({codes})" if codes else ""))
    return table


def _pixels(plan: Plan) -> str:
    sizes = sorted((image.prepared.width or 0, image.prepared.height or 0) for image in plan.good)
    sizes.sort(key=lambda size: size[0] * size[1])
    small, middle, large = sizes[0], sizes[len(sizes) // 2], sizes[-1]
    return " · ".join(f"{width}×{height}" for width, height in (small, middle, large)) + " (smallest, median, largest)"


def _histograms(plan: Plan) -> list[Text]:
    tiles = histogram(plan.good, lambda image: image.prepared.num_tiles or 0)
    tokens = histogram(plan.good, lambda image: image.prompt_tokens)
    return [
        _bars(f"tiles per image: {plan.tiles.value:,.1f} on average", tiles),
        _bars(f"prompt tokens per image: {plan.prompt_tokens.value:,.0f} on average", tokens),
    ]


def _bars(title: str, shares: Mapping[int, float]) -> Text:
    bins = _binned(shares)
    width = max(len(name) for name, _ in bins)
    most = max(share for _, share in bins)
    lines = [f"{name:>{width}} {'█' * max(1, round(share / most * _BAR_CHARS))} {share:.1%}" for name, share in bins]
    return Text("\n".join(["", title, *lines]))


def _binned(shares: Mapping[int, float]) -> list[tuple[str, float]]:
    """A bar a value where these are few, else as many equal steps."""
    if len(shares) <= _MOST_BARS:
        return [(f"{value:,}", share) for value, share in shares.items()]
    low, high = min(shares), max(shares)
    step = -(-(high - low + 1) // _MOST_BARS)
    starts = range(low, high + 1, step)
    inside = [sum(share for value, share in shares.items() if start <= value < start + step) for start in starts]
    return [(f"{start:,}–{start + step - 1:,}", share) for start, share in zip(starts, inside, strict=True) if share]


def _outlook(plan: Plan) -> Group:
    content = to_json(plan)
    table = _facts()
    table.add_row("answers", f"{plan.output_tokens.value:,.0f} tokens per image, all tasks together")
    table.add_row("engines", f"{plan.replicas} × {plan.profile.hardware}")
    low, high = content["images_per_second_interval"]
    table.add_row("speed", f"{content['images_per_second']:,.2f} images/s ({low:,.2f} to {high:,.2f})")
    shortest, longest = (duration(hours * 3600) for hours in content["hours_interval"])
    start = f"{duration(content['start_seconds'])} of it to start and to end"
    table.add_row("time", f"{duration(content['hours'] * 3600)} ({shortest} to {longest}), {start}")
    if content["cost"] is not None:
        least, most = content["cost_interval"]
        table.add_row("cost", f"{content['cost']:,.2f} ({least:,.2f} to {most:,.2f})")
    table.add_row("bottleneck", _bottleneck(plan))
    for warning in content["warnings"]:
        table.add_row("[yellow]warning[/yellow]", warning)
    return Group(Text(), table)


def _bottleneck(plan: Plan) -> str:
    name = {"generate": "the engines", "prepare": "preparation on CPUs", "read": "reading from storage"}
    cores = f"{plan.speed.cpus_per_replica:,.2g} CPU cores of preparation keep one engine busy"
    unknown = plan.profile.device != "cpu" and plan.pool.cpus is None
    return f"{name[plan.speed.bottleneck]}; {cores}" + (" (as many are assumed)" if unknown else "")


def _facts() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table
