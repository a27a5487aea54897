"""Reports as folders: a self-contained HTML page, Markdown, CSV and PNG files."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import pandas as pd

from fedekd.reporting.figures import save
from fedekd.reporting.pages import environment, markdown_cell, minus, write_text

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

#: A file of a report that its successor removes.
_REPORT_FILE = re.compile(r"(tables|figures)/[^/\0]+\.(csv|png)")


@dataclass(frozen=True)
class Picture:
    """A figure of a report.

    Attributes:
        name: File name without extension.
        caption: Its content in words.
        figure: The drawing; None if there is no data for it.
    """

    name: str
    caption: str
    figure: Figure | None


@dataclass(frozen=True)
class Section:
    """A part of a report, with an entry in the navigation.

    Attributes:
        name: Anchor of the section.
        title: Heading.
        text: Paragraphs.
        code: Commands, printed literally.
        tables: By caption, a frame of printed cells. Lines of a cell are separated by a newline.
        pictures: Figures.
        data: By file name without extension, a frame for a CSV file.
    """

    name: str
    title: str
    text: Sequence[str] = ()
    code: Sequence[str] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    data: Mapping[str, pd.DataFrame] = field(default_factory=dict)


def write_document(title: str, text: Sequence[str], sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write a report; an older report in the same folder is replaced.

    Args:
        title: Heading of the page.
        text: Paragraphs below the heading.
        sections: The content.
        folder: Output folder; created if it is missing.

    Returns:
        The files: index.html, report.md, tables/*.csv and figures/*.png.
    """
    listing = folder / "files.txt"
    for line in listing.read_bytes().decode(errors="replace").splitlines() if listing.is_file() else ():
        # Only files of an older report: the user may keep others in the same folder.
        if _REPORT_FILE.fullmatch(line) and (folder / line).is_file():
            (folder / line).unlink()
    pictures = {
        picture.name: folder / "figures" / f"{picture.name}.png"
        for section in sections
        for picture in section.pictures
        if picture.figure is not None
    }
    for section in sections:
        for picture in section.pictures:
            if picture.figure is not None:
                save(picture.figure, pictures[picture.name])
    written = list(pictures.values())
    for section in sections:
        for name, frame in section.data.items():
            written.append(folder / "tables" / f"{name}.csv")
            write_text(written[-1], frame.to_csv(index=False, lineterminator="\n"))
    templates = environment()
    templates.filters["lines"] = _html_lines
    content = {"title": title, "text": text, "sections": sections, "markdown_table": markdown_table}
    embedded = {name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()}
    for name, template in (("report.md", "document.md"), ("index.html", "document.html")):
        page = templates.get_template(template).render(**content, embedded=embedded)
        written.append(folder / name)
        write_text(written[-1], page.rstrip() + "\n")
    write_text(listing, "".join(f"{path.relative_to(folder).as_posix()}\n" for path in written))
    return written


def spread(values: Sequence[float], signed: bool = False) -> str:
    """Return mean and sample standard deviation (with two values) as text.

    Example:
        >>> spread([0.1, 0.3], signed=True), spread([0.25]), spread([0.25, math.nan])
        ('+0.2000 ± 0.1414', '0.2500', '-')
    """
    if any(map(math.isnan, values)):
        return "-"
    middle = f"{mean(values):{'+' if signed else ''}.4f}"
    return f"{middle} ± {stdev(values):.4f}" if len(values) > 1 else middle


def markdown_table(frame: pd.DataFrame) -> str:
    r"""Return a frame as a Markdown table, without its index.

    Example:
        >>> print(markdown_table(pd.DataFrame({"method": ["a|b"], "seeds": [2]})))
        | method | seeds |
        | --- | --- |
        | a\|b | 2 |
    """
    rows = [list(frame.columns), ["---"] * frame.shape[1], *frame.itertuples(index=False)]
    cells = ([markdown_cell(cell).replace("\n", "<br>") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _html_lines(cell: object) -> Markup:
    """Return the lines of a cell as HTML spans.

    The class of a span is its first word, or `best` if the line has a star.
    """
    from markupsafe import Markup

    lines = minus(str(cell)).split("\n")
    if len(lines) == 1:
        return Markup.escape(lines[0])
    names = ["best" if "\N{BLACK STAR}" in line else re.split("[, ]", line)[0] for line in lines]
    span = Markup('<span class="{}">{}</span>')
    return Markup("").join(span.format(name, line) for name, line in zip(names, lines, strict=True))
