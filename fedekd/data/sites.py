"""Sites of a federation: their names, and the file or folder of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedekd.data.formats import format_of
from fedekd.errors import UserError, listed, shorten, shorten_path

_LONGEST_NAME = 60

#: Names in logs and files: no `/`, which separates the parts of a logged name, and nothing that is not printed.
_NAME = re.compile(r"[^\W_](?:[\w .()+-]*[\w.()+-])?")


def find_sites(sites: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the source of each site by name, in order.

    Args:
        sites: A folder, of which each file or subfolder of a known format is a site with the name of the file without
            its suffix, sorted by name; or a mapping from names to sources.

    Raises:
        UserError: If there is no such folder, it has no site, a subfolder has no readable content, or a name is invalid
            or occurs twice.
    """
    found = dict(sites) if isinstance(sites, Mapping) else _in_folder(Path(sites).expanduser())
    require_site_names(found)
    if not found:
        raise UserError(f"data.sites: expected at least one site, got {shorten(repr(sites))}")
    return found


def require_site_names(names: Iterable[Any], option: str = "data.sites") -> None:
    """Validate the names of all sites.

    Args:
        names: Any objects.
        option: Option that gives the names, for the error.

    Raises:
        UserError: If a name is invalid, see `require_site_name`, or two differ in case only: files would clash.
    """
    seen: dict[str, str] = {}
    for name in names:
        require_site_name(name, option)
        if (other := seen.setdefault(name.casefold(), name)) != name:
            raise UserError(f"{option}: expected different names, got {other!r} and {name!r}")


def require_site_name(name: Any, option: str = "data.sites") -> str:
    """Validate the name of a site and return it.

    Args:
        name: Any object.
        option: Option that gives the name, for the error.

    Raises:
        UserError: If it is empty, longer than 60 characters, or has other characters than letters, digits, spaces and
            `_.()+-`.
    """
    if not (isinstance(name, str) and len(name) <= _LONGEST_NAME and _NAME.fullmatch(name)):
        raise UserError(
            f"{option}: expected a name of at most {_LONGEST_NAME} letters, digits, spaces and _.()+- that begins"
            f" with a letter or digit, got {shorten(repr(name))}"
        )
    return name


def error_at_site(error: UserError, site: str) -> UserError:
    """Return an error that names the option first, then the site.

    Args:
        error: Its text begins with an option or a file.
        site: Name of the site.
    """
    option, _, text = str(error).partition(": ")
    if not option.startswith("data.") or " " in option:
        option, text = "data.sites", str(error)
    return UserError(f"{'data.sites' if option == 'data.dataset' else option}: site {site!r}: {text}")


def _in_folder(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        absent = "" if folder.exists() else ", which does not exist"
        raise UserError(
            f"data.sites: expected a folder with a file or subfolder per site, got '{shorten_path(folder)}'{absent}"
        )
    found: dict[str, Any] = {}
    paths = _visible(folder)
    # An empty site would leave the federation without a message.
    if unread := [repr(path.name) for path in paths if path.is_dir() and format_of(path) is None]:
        raise UserError(
            f"data.sites: expected images in each subfolder, got none in {listed(unread)}. Remove it, or move its table"
            " or .npz file up and name it like the site"
        )
    for path in paths:
        if format_of(path) is None:
            continue
        name = path.name if path.is_dir() else path.stem
        if name in found:
            raise UserError(f"data.sites: expected one site of each name, got '{found[name].name}' and '{path.name}'")
        found[name] = path
    if not found:
        raise UserError(
            f"data.sites: expected a file or subfolder per site in a known format, got none in '{shorten_path(folder)}'"
        )
    return found


def skipped_warnings(sites: str | Mapping[str, Any]) -> list[str]:
    """Return a line that names the files of a folder of sites that are no sites.

    Args:
        sites: As in `find_sites`.
    """
    if isinstance(sites, Mapping):
        return []
    paths = _visible(Path(sites).expanduser())
    skipped = [repr(path.name) for path in paths if not path.is_dir() and format_of(path) is None]
    if not skipped:
        return []
    what = (
        "1 file has no known format and is no site"
        if len(skipped) == 1
        else (f"{len(skipped)} files have no known format and are no sites")
    )
    return [f"data.sites: {what}: {listed(skipped)}"]


def _visible(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)
