"""Which addresses a server may send a download on to: its own host, and hosts that are named.

A list of shards, or who gives an image by URL, says whom to trust; an answer of a server does not, and must not turn a
download into a local file, an ftp server or a host inside the cluster.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Collection
from http.client import HTTPMessage
from typing import Any
from urllib.parse import urlsplit

from flamingo.errors import UserError

IMAGE_HOSTS: set[str] = set()
"""Hosts to which the server of an image or clip given by URL may redirect: `IMAGE_HOSTS.add("cdn.example.org")`.

A setting of the process and not of the processor, so that no model folder can bring its own."""


class KnownHosts(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to the same host or one of `hosts`, by the same scheme or from http to https.

    `what` is downloaded, for the message; `allowing` says how to allow a host, whose name it has in braces.
    """

    def __init__(self, hosts: Collection[str], what: str, allowing: str) -> None:
        self.hosts, self.what, self.allowing = hosts, what, allowing

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """Return the next request. Raises UserError for another host or scheme."""
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        if (before.scheme, after.scheme) not in (("http", "http"), ("https", "https"), ("http", "https")):
            raise UserError(
                f"{self.what} {req.full_url} is redirected from {before.scheme} to {newurl}, another scheme, which is "
                "not followed; give its own address"
            )
        if after.hostname != before.hostname and after.hostname not in self.hosts:
            raise UserError(
                f"{self.what} {req.full_url} is redirected to another host, {after.hostname}; if you trust it, "
                + self.allowing.format(after.hostname)
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def urlopen(
    request: urllib.request.Request,
    hosts: Collection[str],
    timeout: float,
    what: str = "shard",
    allowing: str = "set the dataset's redirect_hosts=[{}]",
) -> Any:
    """Open an http(s) address as `urllib.request.urlopen` does, following redirects as `KnownHosts` says."""
    return urllib.request.build_opener(KnownHosts(hosts, what, allowing)).open(request, timeout=timeout)
