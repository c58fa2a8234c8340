"""TLS to brokers and Redis: what an address says of it, as each client wants to be told.

An address carries it as redis-py spells it: `?ssl_ca_certs=/ca.pem` names the authority that is trusted instead of the
system's, `ssl_certfile` and `ssl_keyfile` our own certificate, `ssl_check_hostname=false` and `ssl_cert_reqs=none` turn
parts of the check off, which is on by default. kombu reads this for Redis alone, and only some of it.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from jobs.errors import UsageError

REQUIREMENTS = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}
FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
RABBITMQ_OPTIONS = (*FILES, "ssl_cert_reqs", "ssl_check_hostname")
#: What is said to whoever's server shows a certificate that can't be verified.
HINT = "its host name, and ssl_ca_certs= for an authority of your own"


def untrusted(error: BaseException | None) -> bool:
    """Whether a certificate that can't be verified is behind an error."""
    seen = 0
    while error is not None and seen < 10:  # a chain may have a loop in it
        if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def split(url: str, setting: str) -> tuple[str, dict[str, Any] | None]:
    """The address without its TLS options, and these as `broker_use_ssl` wants them; None without TLS.

    Of several addresses, divided by `;`, the first one's options count. `setting` is named in errors. Raises `UsageError`.
    """
    first, *others = url.split(";")
    try:
        parts = urlsplit(first)
        query = parse_qsl(parts.query)
        host = parts.hostname
    except ValueError:  # whose message may hold a part of the password
        raise UsageError(f"{setting}: can't be read; in its user and password, write /, #, ?, @ and : as %2F") from None
    given = {name: value for name, value in query if name.startswith("ssl_")}
    if parts.scheme not in ("rediss", "amqps"):
        if given:
            raise UsageError(f"{setting}: TLS options such as {min(given)} need rediss:// or amqps://")
        return url, None
    options: dict[str, Any] = {"ssl_cert_reqs": "required", "ssl_check_hostname": "true", **given}
    requirement = REQUIREMENTS.get(options["ssl_cert_reqs"].removeprefix("CERT_").lower())
    if requirement is None:
        raise UsageError(f"{setting}: ssl_cert_reqs must be required, optional or none")
    for name in FILES:
        if name in options and not Path(options[name]).is_file():
            raise UsageError(f"{setting}: {name} names no file that is there")
    checked = requirement != ssl.CERT_NONE and options["ssl_check_hostname"].lower() not in ("false", "no", "0")
    options |= {"ssl_cert_reqs": requirement, "ssl_check_hostname": checked}
    bare = ";".join([_without_tls(first), *map(_without_tls, others)])
    if parts.scheme == "rediss":
        return bare, options
    if unknown := options.keys() - set(RABBITMQ_OPTIONS):
        raise UsageError(f"{setting}: unknown TLS option {min(unknown)}; known are {', '.join(RABBITMQ_OPTIONS)}")
    del options["ssl_check_hostname"]
    if checked:
        # None stands for the host of each address. kombu makes 127.0.0.1 of localhost before it looks.
        options["ssl_server_hostname"] = None if others else host
    return bare, {name.removeprefix("ssl_"): value for name, value in options.items()}


def _without_tls(url: str) -> str:
    address, _, query = url.partition("?")
    kept = [(name, value) for name, value in parse_qsl(query) if not name.startswith("ssl_")]
    return f"{address}?{urlencode(kept)}" if kept else address
