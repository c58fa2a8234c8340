"""Settings: where values come from, what is refused, and that secrets never show."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from jobs.errors import UsageError
from jobs.settings import DEFAULT_BASE_URL, PREFIX, Settings, is_loopback, load_settings, sources

SECRET = "sk-not-for-your-eyes"
SECRETS = {
    "api_key": SECRET,
    "redis_url": f"redis://:{SECRET}@h",
    "broker_url": f"amqp://u:{SECRET}@h",
    "result_backend": f"db+postgresql+psycopg://u:{SECRET}@h/d",
}


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MIMOQ_BASE_URL")
    monkeypatch.chdir(tmp_path)


def env_file(text: str) -> None:
    Path(".env").write_text(text, encoding="utf-8")


def source_of(name: str, settings: Settings | None = None, **overrides: Any) -> tuple[str, str]:
    """`(shown value, source)` of one setting."""
    found = {variable: (value, source) for variable, value, source in sources(settings or load_settings(), **overrides)}
    return found[PREFIX + name]


# -- where values come from


def test_defaults() -> None:
    settings = load_settings()
    assert settings.base_url == DEFAULT_BASE_URL == "https://genaiapi.cloudsway.net"
    assert settings.model == "MaaS_Mimo_V2.5_20260423"
    assert (settings.rpm, settings.tpm, settings.max_in_flight, settings.api_key, settings.redis_url) == (None,) * 5
    assert (settings.worker_max_in_flight, settings.slice_size, settings.max_attempts) == (512, 50, 5)
    assert (settings.call_timeout_s, settings.drain_s, settings.max_line_bytes) == (600.0, 30.0, 20_000_000)
    assert (settings.store_patience_s, load_settings(store_patience_s=0).store_patience_s) == (60.0, 0.0)
    assert (settings.data_dir, settings.result_compression, settings.log_format) == (Path(".mimoq"), "gzip", None)


def test_the_call_goes_before_the_environment_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    env_file("MIMOQ_RPM=1\nMIMOQ_TPM=1\nMIMOQ_MODEL=from-file\n")
    monkeypatch.setenv("MIMOQ_RPM", "2")
    monkeypatch.setenv("mimoq_tpm", "2")
    settings = load_settings(rpm=3)
    assert (settings.rpm, settings.tpm, settings.model) == (3, 2, "from-file")
    assert source_of("RPM", settings, rpm=3) == ("3", "command line")
    assert source_of("TPM", settings, rpm=3) == ("2", "environment")
    assert source_of("MODEL", settings) == ("from-file", ".env")
    assert source_of("SLICE_SIZE", settings) == ("50", "default")
    assert source_of("MAX_IN_FLIGHT", settings) == ("(unset)", "default")


def test_an_override_of_none_is_none_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMOQ_RPM", "2")
    assert load_settings(rpm=None).rpm == 2
    assert source_of("RPM", rpm=None) == ("2", "environment")


@pytest.mark.parametrize("name", ["API_KEY", "RPM", "BASE_URL", "ALLOW_INSECURE_HTTP", "LOG_FORMAT", "ENDPOINT_PATH"])
def test_an_empty_variable_counts_as_unset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_settings()
    monkeypatch.setenv(PREFIX + name, "")
    assert load_settings() == before
    assert source_of(name)[1] == "default"
    env_file(f"{PREFIX}{name}=\n")
    assert load_settings() == before
    assert source_of(name)[1] == "default"


def test_an_empty_variable_hides_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    env_file("MIMOQ_RPM=7\n")
    monkeypatch.setenv("MIMOQ_RPM", "")
    assert load_settings().rpm == 7
    assert source_of("RPM") == ("7", ".env")


def test_what_is_not_ours_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    env_file("RPM=1\nMIMOQ_NO_SUCH_THING=1\nOTHER=x\n")
    monkeypatch.setenv("RPM", "1")
    monkeypatch.setenv("MIMOQ_NEITHER_THIS", "1")
    assert load_settings() == Settings.model_construct()


def test_every_setting_has_a_description_and_a_source() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
    listed = [variable for variable, _, _ in sources(load_settings())]
    assert listed == [PREFIX + name.upper() for name in Settings.model_fields]


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().rpm = 3  # type: ignore[misc]  # the point


# -- secrets


def test_secrets_show_nowhere() -> None:
    settings = load_settings(**SECRETS)
    shown = [repr(settings), str(settings), settings.model_dump_json(), repr(list(sources(settings, **SECRETS)))]
    assert [text for text in shown if SECRET in text] == []
    assert {source_of(name.upper(), settings, **SECRETS) for name in SECRETS} == {("**********", "command line")}


def test_every_field_that_may_hold_a_password_is_secret() -> None:
    settings = load_settings(**SECRETS)
    assert [name for name in SECRETS if not isinstance(getattr(settings, name), SecretStr)] == []
    assert pickle.loads(pickle.dumps(settings)) == settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("api_key", f"{SECRET} and more"),
        ("api_key", f"{SECRET}é"),
        ("api_key", f"{SECRET}\x07x"),
        ("redis_url", f"http://:{SECRET}@h"),
        ("redis_url", f"redis://:{SECRET}/x@h"),
        ("redis_url", f"redis://:{SECRET}\u2100@h"),
        ("broker_url", f"u:{SECRET}@h"),
        ("broker_url", f"amqp://u:{SECRET}/x@h//"),
        ("broker_url", f"amqp://u:p@h//;amqp://u:p@h:{SECRET}//"),
        ("result_backend", f"u:{SECRET}@h/d"),
        ("result_backend", f"db+postgresql+psycopg://u:{SECRET}/x@h/d"),
        ("base_url", f"https://user:{SECRET}@host"),
        ("base_url", f"https://host/?key={SECRET}"),
        ("base_url", f"http://{SECRET}.example"),
        ("rpm", SECRET),
    ],
)
def test_a_refusal_names_the_setting_and_not_its_value(name: str, value: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_settings(**{name: value})
    assert str(refused.value).startswith(PREFIX)
    assert SECRET not in f"{refused.value}{refused.value!r}{refused.value.__cause__}"
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2


# -- rules


@pytest.mark.parametrize("key", ["", "  ", "\n"])
def test_a_blank_key_is_no_key(key: str) -> None:
    assert load_settings(api_key=key).api_key is None


def test_a_key_is_trimmed() -> None:
    key = load_settings(api_key=f" {SECRET}\n").api_key
    assert key is not None
    assert key.get_secret_value() == SECRET


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://host", "https://host"),
        ("https://host/", "https://host"),
        ("https://host/v1", "https://host"),
        ("https://host/v1/", "https://host"),
        ("https://host/proxy", "https://host/proxy"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://[::1]:8080/", "http://[::1]:8080"),
        ("http://localhost", "http://localhost"),
    ],
)
def test_base_urls(given: str, kept: str) -> None:
    assert load_settings(base_url=given).base_url == kept


@pytest.mark.parametrize(
    "url", ["host", "ftp://host", "https://", "https://u@host", "https://h?x=1", "https://h#x", "//h"]
)
def test_a_bad_base_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"^MIMOQ_BASE_URL: must "):
        load_settings(base_url=url)


@pytest.mark.parametrize("url", ["http://example.com", "http://10.0.0.1", "http://127.0.0.1.example.com", "HTTP://h"])
def test_plain_http_is_refused_but_by_express_wish(url: str) -> None:
    with pytest.raises(UsageError, match="MIMOQ_ALLOW_INSECURE_HTTP=true"):
        load_settings(base_url=url)
    assert load_settings(base_url=url, allow_insecure_http=True).base_url == url


@pytest.mark.parametrize(("given", "kept"), [("my-endpoint", "my-endpoint"), ("/a/b/", "a/b")])
def test_endpoint_paths(given: str, kept: str) -> None:
    assert load_settings(endpoint_path=given).endpoint_path == kept


@pytest.mark.parametrize("path", ["/", "a?b", "a#b", "a%2f", "a\\b", "a b", "../a", "a/.."])
def test_a_bad_endpoint_path_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match=r"^MIMOQ_ENDPOINT_PATH: must be the plain path"):
        load_settings(endpoint_path=path)


@pytest.mark.parametrize("url", ["redis://h:1/0", "rediss://h", "unix:///s?db=1"])
def test_redis_urls(url: str) -> None:
    found = load_settings(redis_url=url).redis_url
    assert found is not None
    assert found.get_secret_value() == url


@pytest.mark.parametrize("url", ["h:6379", "http://h", "redis+socket:///s", "amqp://h"])
def test_a_bad_redis_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"^MIMOQ_REDIS_URL: must be(gin with| an address like)"):
        load_settings(redis_url=url)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(
            (name, value)
            for name in ("rpm", "tpm", "max_in_flight", "slice_size", "max_attempts")
            for value in (0, -1, 1.5)
        ),
        *((name, 0) for name in ("worker_max_in_flight", "max_line_bytes", "result_ttl_s")),
        *(
            (name, value)
            for name in ("call_timeout_s", "connect_timeout_s", "idle_timeout_s")
            for value in (0, "inf", "nan")
        ),
        ("slice_size", 1001),
        ("drain_s", -0.1),
        ("drain_s", "inf"),
        ("store_patience_s", -0.1),
        ("store_patience_s", "inf"),
        ("streaming", "sometimes"),
        ("result_compression", "zstd"),
        ("log_level", "loud"),
        ("log_format", "xml"),
        ("simulated", "perhaps"),
    ],
)
def test_values_out_of_bounds_are_refused(name: str, bad: object) -> None:
    with pytest.raises(UsageError, match=f"^{PREFIX}{name.upper()}: "):
        load_settings(**{name: bad})


def test_all_that_is_wrong_is_told_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"^MIMOQ_RPM: .+; MIMOQ_TPM: .+$"):
        load_settings(rpm=0, tpm=0)


@pytest.mark.parametrize(
    ("name", "given"),
    [("log_level", "DEBUG"), ("log_format", "JSON"), ("streaming", "Never"), ("result_compression", "None")],
)
def test_choices_may_be_written_in_capitals(name: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + name.upper(), given)
    assert getattr(load_settings(), name) == given.lower()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("", False),
        ("localhost.example.com", False),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("2130706433", False),
    ],
)
def test_loopback_hosts(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
