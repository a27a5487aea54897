"""Errors of a site: the full text in its log, one without data for the server."""

from __future__ import annotations

import sys
from collections.abc import Callable

from flwr.app import Context, Message

from fedekd.data.sites import require_site_name
from fedekd.errors import LONGEST_ERROR, UserError, describe_error, shorten


class SiteError(UserError):
    """Error whose text is sent to the server: it quotes nothing of the data."""


def withhold_texts(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Replace the text of other errors than `SiteError`; the outermost mod.

    Flower sends the text of an exception to the server, and the text of an error in the data quotes cells of a table,
    groups and paths. The site's log has the full text, with the traceback.

    Raises:
        SiteError: The reply fails.
    """
    try:
        return call_next(message, context)
    except SiteError:
        raise
    except Exception as error:  # of any kind: a library may quote values, too
        text = str(error) if isinstance(error, UserError) else describe_error(error)
        print(f"error: {shorten(text, LONGEST_ERROR)}", file=sys.stderr, flush=True)
        subject = "its data or options cannot be used" if isinstance(error, UserError) else "it failed"
        raise SiteError(f"{_label(context)}: {subject}; the reason is in the site's log") from error


def _label(context: Context) -> str:
    """Return the site in a message: its name, its number, or that it has neither."""
    name, number = (context.node_config.get(option) for option in ("name", "number"))
    try:
        return f"site {require_site_name(name)!r}"
    except UserError:
        number = context.node_config.get("partition-id") if number is None else number
        return f"site {number}" if isinstance(number, int) else "a site"
