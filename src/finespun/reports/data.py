"""What a check of data found, as a page and on a terminal, and what a selection changed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from finespun.data.check import Check
from finespun.data.selection import Selection
from finespun.reports.figures import count, date, percent, share
from finespun.reports.page import bars, named, write_page

SEVERITIES = {"stops": "Stops training", "misleads": "Misleads", "look": "To look at"}


def write_check(check: Check, page: Path, name: str, model: str) -> None:
    """Writes the page of a check of the data called `name`, for the tokens of `model` where they were counted. Raises
    `RunError` where the disk does not take it."""
    lengths = check.lengths
    view = {
        "name": name,
        "model": model if lengths and lengths.unit == "tokens" else None,
        "checked": date(datetime.now()),
        "check": check,
        "verdict": _verdict(check),
        "words": SEVERITIES,
        "bars": lengths and bars(lengths.counts, lengths.edges, lengths.median, f" {lengths.unit}"),
        "files": named(check.files),
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    write_page(page, "check.html.j2", view)


def check_lines(check: Check, places: int = 3) -> list[str]:
    """What a check found, for a terminal; of each finding the first `places` rows."""
    lines = list(check.how)
    kept = f"{count(check.train)} rows to train, {count(check.held_out)} held out"
    lines.append(kept + "".join(f", {count(number)} left out ({kind} …)" for kind, number in check.left_out.items()))
    if lengths := check.lengths:
        trained = percent(100 * lengths.trained / max(lengths.total, 1))
        lines += [
            f"{count(lengths.total)} {lengths.unit}, {trained} of them trained; an example has "
            f"{count(lengths.median)} in the median, {count(lengths.p95)} or fewer in 95 %, "
            f"{count(lengths.longest)} at most",
            f"  0 {_sparkline(lengths.counts)} {count(lengths.longest)}",
        ]
        if lengths.limits:
            lines.append("  with data.max_length   are longer          tokens beyond it")
            lines += [
                f"  {count(limit.max_length):>15}   {share(limit.longer, lengths.examples):<17}   "
                f"{share(limit.beyond, lengths.total)}"
                for limit in lengths.limits
            ]
    if check.languages:
        total = sum(check.languages.values())
        said = [f"{code or 'not told'} {percent(100 * number / total)}" for code, number in check.languages.items()]
        lines.append(f"Languages of what is trained: {', '.join(said[:8])}{', …' if said[8:] else ''}")
    lines += check.remarks
    for finding in check.findings:
        lines += ["", f"{SEVERITIES[finding.severity]}: {share(finding.count, finding.of)} {finding.title}"]
        lines += [f"    {origin}{f': {detail}' if detail else ''}" for origin, detail in finding.places[:places]]
        if (rest := finding.count - places) > 0:
            lines.append(f"    … and {count(rest)} more")
        lines.append(f"  → {finding.remedy}")
    return [*lines, "", _verdict(check)]


def _verdict(check: Check) -> str:
    """What a check comes to, in a sentence."""
    kinds = Counter(finding.severity for finding in check.findings)
    if kinds["stops"]:
        return "Training would refuse this data as it is."
    if kinds["misleads"]:
        return "Training would take this data, but would learn or measure something else than it seems to."
    return "Nothing was found that speaks against training." + (" Some things are worth a look." if kinds else "")


def _sparkline(counts: Sequence[int]) -> str:
    """A histogram in one line; what is not nothing can be seen."""
    highest = max(counts)
    return "".join("▁▂▃▄▅▆▇█"[math.ceil(7 * number / highest)] for number in counts)


def selection_lines(selection: Selection, keep: int, left_out: int) -> list[str]:
    """What a selection changed, for a terminal; `left_out` rows of the pool were not looked at."""
    before, chance, after = (
        f"{value:.3f}"
        for value in (selection.divergence_before, selection.divergence_random, selection.divergence_after)
    )
    lines = [
        f"{count(len(selection))} of {count(len(selection.log_weights))} rows selected; "
        f"{count(selection.near_duplicates)} passed over as near-duplicates",
        f"Distance from the target (KL divergence, nats): {before} for the whole pool, {chance} for as many "
        f"rows taken at random, {after} for the selection",
    ]
    if left_out:
        lines.append(f"{count(left_out)} rows of the pool cannot be used or are left out by its cleaning")
    if len(selection) < keep:
        lines.insert(1, f"That is fewer than the {count(keep)} asked for: nothing else is left that differs.")
    for what, moved in (("More frequent", selection.gained), ("Less frequent", selection.lost)):
        words = ", ".join(f"{unit} {100 * was:.2f} → {100 * now:.2f} %" for unit, was, now in moved[:8])
        lines.append(f"{what} than in the pool: {words or 'nothing'}")
    return lines
