"""Which addresses a server of shards may send a download on to: its own host, and hosts that are named.

A list of shards says whom to trust; an answer of a server does not, and must not turn a download into a local file, an
ftp server or a host inside the cluster.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Collection
from http.client import HTTPMessage
from typing import IO, Any
from urllib.parse import urlsplit

from flamingo.errors import UserError


class KnownHosts(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to the same host or one of `hosts`, by the same scheme or from http to https."""

    def __init__(self, hosts: Collection[str]) -> None:
        self.hosts = hosts

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """Return the next request. Raises UserError for another host or scheme."""
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        if (before.scheme, after.scheme) not in (("http", "http"), ("https", "https"), ("http", "https")):
            raise UserError(
                f"shard {req.full_url} is redirected from {before.scheme} to {newurl}, another scheme, which is not "
                "followed; name the shard by its own address"
            )
        if after.hostname != before.hostname and after.hostname not in self.hosts:
            raise UserError(
                f"shard {req.full_url} is redirected to another host, {after.hostname}; if you trust it, set the "
                f"dataset's redirect_hosts=[{after.hostname}]"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def urlopen(request: urllib.request.Request, hosts: Collection[str], timeout: float) -> Any:
    """Open an http(s) address as `urllib.request.urlopen` does, following redirects as `KnownHosts` says."""
    return urllib.request.build_opener(KnownHosts(hosts)).open(request, timeout=timeout)
