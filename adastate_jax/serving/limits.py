"""Who may do what, and how often: rates, origins, the server's token. The clock is handed in."""

import ipaddress
import secrets
from collections import OrderedDict
from urllib.parse import urlsplit

_MOST_CLIENTS = 4096  # whose rates are remembered


class Rate:
    """So many at once, and from then on so many per second."""

    def __init__(self, per_second: float, burst: float):
        self._per_second, self._burst = per_second, burst
        self._left, self._at = burst, None

    def take(self, now: float) -> bool:
        """Whether there is room for one more, which is then taken."""
        if self._at is not None:
            self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Rates:
    """A rate for each client; of those that have not been seen for the longest, none is kept."""

    def __init__(self, per_second: float, burst: float):
        self._settings = per_second, burst
        self._rates: OrderedDict[str, Rate] = OrderedDict()

    def take(self, client: str, now: float) -> bool:
        rate = self._rates.setdefault(client, Rate(*self._settings))
        self._rates.move_to_end(client)
        while len(self._rates) > _MOST_CLIENTS:
            self._rates.popitem(last=False)
        return rate.take(now)


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Door:
    """Whether a request is let in.

    On a loopback address a request must name this machine as its host: else a page of another site that has its name
    point here could steer it. Elsewhere it must have the token.
    """

    def __init__(self, host: str, token: str | None):
        self._loopback, self._token = is_loopback(host), token

    def refusal(self, host: str, origin: str | None, authorization: str | None, guarded: bool) -> str | None:
        """Why a request is refused; None lets it in.

        Args:
            host, origin, authorization: its headers.
            guarded: whether it needs the token, where there is one.
        """
        if self._loopback and self._token is None and not is_loopback(_name(host)):
            return "the request names another host than this machine"
        if origin is not None and _place(origin) != host:
            return "the request comes from another site's page"
        if guarded and self._token is not None:
            given = (authorization or "").removeprefix("Bearer ")
            if not secrets.compare_digest(given.encode(), self._token.encode()):
                return "the server's token is missing or wrong"
        return None


def _place(origin: str) -> str:
    """Host and port of an origin."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _name(host: str) -> str:
    """The host's name or address, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
