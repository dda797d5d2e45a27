"""How a server is reached: its address, the key, Azure's form of both, and a proxy that may stand in between."""

import ipaddress
import os
import urllib.request
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from alpaca.common import ExitCode, ExpectedError

SHORTEST_SECRET = 16  # characters; "EMPTY", "none" or "token-abc123" are what servers of one's own are given


class Connection:
    """The client for a base URL (None: OPENAI_BASE_URL, or OpenAI) and the key in OPENAI_API_KEY.

    A query in the URL goes with every request, as Azure's `…/openai/deployments/NAME?api-version=…` needs it; such a
    server is sent the key as `api-key`. Raises ExpectedError, USAGE or, for the key, API.
    """

    def __init__(self, base_url: str | None, timeout: float):
        import openai

        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        parts = urlsplit(base_url.strip())
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ExpectedError("--base_url is no URL; write it like http://127.0.0.1:8000/v1", ExitCode.USAGE)
        self.hostname = parts.hostname
        self.host = parts.netloc.rpartition("@")[2]  # for messages: without user and password
        path = parts.path.rstrip("/").removesuffix("/completions").removesuffix("/chat")  # the whole address, pasted
        query = dict(parse_qsl(parts.query))
        azure = "/openai/deployments/" in f"{path}/"
        if azure and not query.setdefault("api-version", os.environ.get("OPENAI_API_VERSION", "")):
            raise ExpectedError(
                "--base_url is of an Azure deployment and needs its version: add ?api-version=2024-10-21, or use the "
                "newer form https://<resource>.openai.azure.com/openai/v1",
                ExitCode.USAGE,
            )
        self.key = _key(self.host)
        self.secret = self.key if len(self.key) >= SHORTEST_SECRET else ""
        self.proxy = _proxy(parts.scheme, self.host)
        options: dict[str, Any] = {"default_query": query} if query else {}
        # Of each request; Azure takes "Authorization" for something else.
        self.headers = {"api-key": self.key, "Authorization": openai.Omit()} if azure else None
        try:
            self.client = openai.AsyncOpenAI(
                api_key=self.key or "none",  # servers of one's own mostly want no key, but the client wants a value
                base_url=urlunsplit((parts.scheme, parts.netloc, path, "", "")),
                max_retries=0,
                timeout=timeout,
                **options,
            )
        except (ImportError, ValueError) as error:  # of the proxy's scheme
            raise ExpectedError(
                f"the proxy in the environment ({', '.join(_proxies())}) can't be used: {str(error).splitlines()[0]}; "
                "write it http://… or socks5://… (which needs: pip install socksio), unset it, or go around it with "
                f"NO_PROXY={self.hostname}",
                ExitCode.USAGE,
            )

    def redact(self, text: str) -> str:
        """Servers quote keys in their error texts; no log or message of ours may."""
        return text.replace(self.secret, "[key]") if self.secret else text

    def way_around_proxy(self) -> str:
        """What to say of a proxy where a server can't be reached or answers strangely; "" where there is none."""
        return f" (asked through the proxy {self.proxy}; NO_PROXY={self.hostname} goes around it)" if self.proxy else ""

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.hostname).is_loopback
        except ValueError:
            return self.hostname == "localhost"


def _key(host: str) -> str:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and host == "api.openai.com":
        raise ExpectedError(
            "no API key: set the environment variable OPENAI_API_KEY, or --base_url for a server of your own",
            ExitCode.API,
        )
    for index, character in enumerate(key, 1):
        if not "!" <= character <= "~":  # such as the dash that a word processor makes of a hyphen
            shown = f"{character} (U+{ord(character):04X})" if character.isprintable() else f"U+{ord(character):04X}"
            raise ExpectedError(
                f"OPENAI_API_KEY has the character {shown} at place {index}, which no key has; copy it again from "
                "where it was made",
                ExitCode.API,
            )
    return key


def _proxies() -> list[str]:
    """The environment's proxies as it sets them, without user and password."""
    proxies = urllib.request.getproxies_environment()
    return [f"{scheme.upper()}_PROXY={_without_password(url)}" for scheme, url in proxies.items() if scheme != "no"]


def _without_password(url: str) -> str:
    scheme, slashes, rest = url.rpartition("://")
    return f"{scheme}{slashes}{rest.rpartition('@')[2]}"


def _proxy(scheme: str, host: str) -> str:
    """The proxy that requests to a host go through; "" where there is none."""
    proxies = urllib.request.getproxies_environment()
    if urllib.request.proxy_bypass_environment(host, proxies):
        return ""
    return _without_password(proxies.get(scheme) or proxies.get("all") or "")
