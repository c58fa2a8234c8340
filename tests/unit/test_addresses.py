"""Which addresses of users may be called, as they are submitted: see `test_outbound` for what is connected to."""

from __future__ import annotations

import pytest

from api.addresses import MAX_URL, check_url, is_public
from jobs.errors import UsageError
from jobs.settings import Settings

CLOSED = Settings()
HTTP = Settings(webhook_allow_http=True)
OPEN = Settings(webhook_allow_http=True, webhook_allow_private=True)

PRIVATE = [
    "0.0.0.0",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",  # Alibaba's metadata
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",  # Azure's
    "169.254.169.254",  # nearly everybody's
    "169.254.170.2",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",  # Oracle's
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0:8.8.8.8",
    "64:ff9b::10.0.0.1",
    "64:ff9b::169.254.169.254",
    "64:ff9b:1::8.8.8.8",
    "100::1",
    "2001::1",  # Teredo
    "2001:0:7f00:1::",
    "2001:2::1",
    "2001:10::1",
    "2001:20::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:808:808::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "",
    "localhost",
    "2130706433",
    "0x7f.1",
    "127.1",
]
PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "168.63.129.15",
    "172.15.255.255",
    "172.32.0.0",
    "192.0.1.1",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
    "2001:4860:4860::8888",
    "2606:4700::1111",
    "2a00::1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_what_is_not_everybodys_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_what_is_everybodys_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example/a/b?key=1&other=%20",
        "https://hooks.example",
        "https://HOOKS.example:8443/a",
        "https://8.8.8.8/a",
        "https://[2606:4700::1111]:444/a",
        "https://xn--bcher-kva.example/",
        "https://hooks.example./",
        "https://a_b-c.example/",
        f"https://{'a' * 63}.example/",
        f"https://{'a.' * 126}a/",
        "https://hooks.example/" + "a" * (MAX_URL - 22),
    ],
)
def test_an_ordinary_address_is_fine(url: str) -> None:
    assert check_url(url, CLOSED).host


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://hooks.example/", "must begin with https://$"),
        ("HTTP://hooks.example/", "must begin with https://"),
        ("ftp://hooks.example/", "must begin with https://"),
        ("file:///etc/passwd", "must begin with https://"),
        ("unix:///run/x.sock", "must begin with https://"),
        ("hooks.example/a", "must begin with https://"),
        ("//hooks.example/a", "must begin with https://"),
        ("", "must begin with https://"),
        ("https://", "can't be read|names no host"),
        ("https:///a", "can't be read|names no host"),
        ("https:hooks.example", "names no host"),
        ("https://:443/a", "can't be read|names no host"),
        ("https://hooks.example:0/", "port"),
        ("https://hooks.example:65536/", "can't be read"),
        ("https://hooks.example:x/", "can't be read"),
        ("https://[::1/", "can't be read"),
        ("https://user@hooks.example/", "no user"),
        ("https://user:word@hooks.example/", "no user"),
        ("https://:word@hooks.example/", "no user"),
        ("https://hooks.example/#part", "no fragment"),
        ("https://hooks.example/#", "no fragment"),
        ("https://hooks.example/a b", "percent-encoded"),
        ("https://hooks.example\\@127.0.0.1/", "percent-encoded"),
        ("https://hooks.example/\r\nX: y", "percent-encoded"),
        ("https://hooks.example/\0", "percent-encoded"),
        ("https://bücher.example/", "percent-encoded"),
        ("https://127。0。0。1/", "percent-encoded"),
        ("https://hooks.example/" + "a" * MAX_URL, "2048"),
        ("https://2130706433/", "as a number"),
        ("https://0x7f000001/", "as a number"),
        ("https://0x7f.1/", "as a number"),
        ("https://0177.0.0.1/", "as a number"),
        ("https://127.1/", "as a number"),
        ("https://127.0.0.1./", "as a number"),
        *(
            (f"https://{host}/", "a host that can't be")
            for host in (
                "a..b",
                ".",
                ".a",
                "a..",
                "%",
                "a%20b",
                "hooks%2eexample",
                "a,b",
                "a" * 64,
                f"hooks.{'a' * 64}.example",
                "a." * 127 + "a",
            )
        ),
        ("https://xn--a/", "can't be read"),
        ("https://[fe80::1%25eth0]/", "as a number|can't be read"),
        *((f"https://{host}/", "not public") for host in PRIVATE if host.count(".") == 3 and ":" not in host),
        *((f"https://[{host}]/", "not public") for host in PRIVATE if ":" in host and "%" not in host),
    ],
)
def test_an_address_that_will_never_be_called_is_refused_at_once(url: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        check_url(url, CLOSED)


def test_settings_allow_what_they_name_and_nothing_else() -> None:
    assert check_url("http://hooks.example/", HTTP)
    assert check_url("http://127.0.0.1:8080/", OPEN)
    with pytest.raises(UsageError, match="not public"):
        check_url("http://127.0.0.1/", HTTP)
    with pytest.raises(UsageError, match="https:// or http://"):
        check_url("ftp://hooks.example/", OPEN)
    for url in ("https://2130706433/", "https://user@hooks.example/", "https://hooks.example/#"):
        with pytest.raises(UsageError):
            check_url(url, OPEN)


@pytest.mark.parametrize("url", ["https://user:word@hooks.example/?secret", "http://hooks.example/?secret"])
def test_a_refusal_does_not_repeat_the_address(url: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_url(url, CLOSED)
    assert "secret" not in str(refused.value)
    assert "word@" not in str(refused.value)
