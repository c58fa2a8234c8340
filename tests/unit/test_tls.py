"""What an address says of TLS, as each client is told."""

from __future__ import annotations

import itertools
import ssl
from typing import Any

import pytest

from jobs import tls
from jobs.errors import UsageError
from tests.tls import authority

CA = authority()[0]
HERE = "MIMOQ_BROKER_URL"


@pytest.mark.parametrize(
    ("url", "bare", "options"),
    [
        ("redis://h/0", "redis://h/0", None),
        ("unix:///s?db=2", "unix:///s?db=2", None),
        ("amqp://h", "amqp://h", None),
        ("rediss://h/0", "rediss://h/0", {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}),
        (
            f"rediss://u:p%2Fw@h/0?ssl_ca_certs={CA}&a=b",
            "rediss://u:p%2Fw@h/0?a=b",
            {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True, "ssl_ca_certs": CA},
        ),
        (
            "rediss://h/0?ssl_cert_reqs=CERT_NONE",
            "rediss://h/0",
            {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False},
        ),
        ("amqps://u@h//", "amqps://u@h//", {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": "h"}),
        (
            "amqps://a//;amqps://b//",
            "amqps://a//;amqps://b//",
            {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": None},
        ),
        (
            f"amqps://h//?ssl_ca_certs={CA}&ssl_check_hostname=false&heartbeat=9",
            "amqps://h//?heartbeat=9",
            {"cert_reqs": ssl.CERT_REQUIRED, "ca_certs": CA},
        ),
    ],
    ids=itertools.count(),  # the certificate's path is another one in each process
)
def test_an_address_and_its_options(url: str, bare: str, options: dict[str, Any] | None) -> None:
    assert tls.split(url, HERE) == (bare, options)


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("amqp://u:secret@h//?ssl_ca_certs=/x", "ssl_ca_certs need rediss:// or amqps://"),
        ("rediss://u:secret@h/0?ssl_cert_reqs=never", "required, optional or none"),
        ("rediss://u:secret@h/0?ssl_ca_certs=/nowhere/ca.pem", "names no file"),
        ("amqps://u:secret@h//?ssl_ciphers=x", "unknown TLS option ssl_ciphers"),
        ("rediss://u:se[cret@h/0", "can't be read"),
    ],
)
def test_what_is_wrong_is_told_in_a_line_without_the_password(url: str, rule: str) -> None:
    with pytest.raises(UsageError) as caught:
        tls.split(url, HERE)
    assert str(caught.value).startswith(f"{HERE}: ")
    assert rule in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "cret" not in str(caught.value)


def test_an_untrusted_certificate_is_told_from_other_errors() -> None:
    error = OSError("any")
    error.__context__ = ssl.SSLCertVerificationError("any")
    assert tls.untrusted(error)
    assert not tls.untrusted(OSError("any"))
    looped = OSError("any")
    looped.__context__ = OSError("other")
    looped.__context__.__context__ = looped
    assert not tls.untrusted(looped)
