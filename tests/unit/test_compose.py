"""docker-compose.yml: what every service is held to, and that what it says of mimoq is so."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
OURS = ("worker", "api", "simulator")
PROFILES = {
    "worker": [],
    "api": [],
    "valkey": [],
    "rabbitmq": ["rabbitmq"],
    "postgres": ["postgres"],
    "prometheus": ["monitoring"],
    "grafana": ["monitoring"],
    "flower": ["flower"],
    "simulator": ["simulator"],
}
#: `${NAME:-default}`, and `$$` for a dollar sign.
VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?::-([^}]*))?\})")


def resolved(value: Any, given: dict[str, str] | None = None) -> Any:
    """A part of the file as Compose reads it, with these variables alone."""
    if isinstance(value, dict):
        return {key: resolved(item, given) for key, item in value.items()}
    if isinstance(value, list):
        return [resolved(item, given) for item in value]
    if not isinstance(value, str):
        return value
    return VARIABLE.sub(lambda found: found[1] or (given or {}).get(found[2]) or found[3] or "", value)


def read(**given: str) -> dict[str, Any]:
    """The file, with these variables of `.env`."""
    found: dict[str, Any] = resolved(yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8")), given)
    return found


COMPOSE = read()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
every_service = pytest.mark.parametrize("name", SERVICES)


def seconds(text: str) -> float:
    """A duration as `1m15s`."""
    return sum(
        float(number) * {"s": 1, "m": 60, "h": 3600}[unit] for number, unit in re.findall(r"([\d.]+)([smh])", text)
    )


def sources(service: dict[str, Any]) -> list[str]:
    """What the service mounts from outside, named volumes and paths."""
    return [str(volume).partition(":")[0] for volume in service.get("volumes", [])]


def test_the_services_and_their_profiles() -> None:
    assert {name: service.get("profiles", []) for name, service in SERVICES.items()} == PROFILES


@every_service
def test_a_service_is_held_to_the_rules(name: str) -> None:
    service = SERVICES[name]
    image, _, tag = service["image"].partition(":")
    assert image
    assert re.match(r"v?\d+\.\d+", tag), "a tag that stays what it is, at least to the minor version"
    user, _, group = service["user"].partition(":")
    assert user.isdecimal()
    assert group.isdecimal()
    assert int(user) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert service["pids_limit"] > 0
    assert service["logging"]["options"]["max-size"]
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    for unsafe in ("container_name", "privileged", "cap_add", "network_mode", "pid", "ipc", "devices"):
        assert unsafe not in service
    assert not any("docker.sock" in source for source in sources(service))


@every_service
def test_a_port_is_published_on_loopback_alone(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)


def test_no_store_publishes_a_port_or_reaches_out() -> None:
    for name in ("valkey", "rabbitmq", "postgres", "worker"):
        assert "ports" not in SERVICES[name]
    for name in ("valkey", "rabbitmq", "postgres"):
        assert SERVICES[name]["networks"] == ["stores"]
    assert COMPOSE["networks"]["stores"] == {"internal": True}


def test_what_must_outlive_a_container_is_in_a_named_volume() -> None:
    kept = {
        name: [source for source in sources(service) if not source.startswith(".")]
        for name, service in SERVICES.items()
    }
    assert {name: volumes for name, volumes in kept.items() if volumes} == {
        "api": ["files"],
        "valkey": ["valkey"],
        "rabbitmq": ["rabbitmq"],
        "postgres": ["postgres"],
        "prometheus": ["prometheus"],
        "grafana": ["grafana"],
    }
    assert sorted(COMPOSE["volumes"]) == sorted(volume for volumes in kept.values() for volume in volumes)
    assert SERVICES["api"]["volumes"] == [f"files:{SERVICES['api']['environment']['MIMOQ_FILES_DIR']}"]


@every_service
def test_what_is_mounted_from_here_is_there_and_read_only(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source, _, rest = volume.partition(":")
        if source.startswith("."):
            assert (ROOT / source).exists()
            assert rest.endswith(":ro")


@every_service
def test_a_dependency_is_waited_for_until_it_is_well(name: str) -> None:
    for other, wanted in SERVICES[name].get("depends_on", {}).items():
        assert wanted["condition"] == "service_healthy"
        # Of another profile: only where that is asked for.
        assert wanted.get("required", True) is (PROFILES[other] in ([], PROFILES[name]))


def test_valkey_keeps_what_it_is_told_and_drops_nothing() -> None:
    argv = SERVICES["valkey"]["command"]
    options = dict(zip(argv[1::2], argv[2::2], strict=True))
    assert argv[0] == "valkey-server"
    assert options["--appendonly"] == "yes"
    assert options["--appendfsync"] == "everysec"
    assert options["--maxmemory-policy"] == "noeviction"
    assert SERVICES["valkey"]["volumes"] == [f"valkey:{options['--dir']}"]
    room = re.fullmatch(r"(\d+)gb", options["--maxmemory"])
    limit = re.fullmatch(r"(\d+)g", SERVICES["valkey"]["mem_limit"])
    assert room is not None
    assert limit is not None
    assert 2 * int(room[1]) <= int(limit[1]), "rewriting the file takes memory beside what is kept"


def test_a_worker_has_the_time_to_drain() -> None:
    drain_s = Settings.model_fields["drain_s"].default
    # An answer may come with the drain's last second, and its store may be away for 30 s then.
    assert seconds(SERVICES["worker"]["stop_grace_period"]) >= drain_s + 30
    assert seconds(SERVICES["simulator"]["stop_grace_period"]) >= drain_s + 30
    assert seconds(SERVICES["api"]["stop_grace_period"]) >= 20


@pytest.mark.parametrize("name", OURS)
def test_our_services_run_our_image(name: str) -> None:
    service = SERVICES[name]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert service["image"] == f"mimoq:{version}"
    assert (ROOT / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert service["healthcheck"]["test"][-1] == "ops.health"
    writable = [str(mount).partition(":")[0] for mount in service["tmpfs"]]
    assert "/tmp" in writable
    assert service["environment"]["MIMOQ_DATA_DIR"] in writable


@pytest.mark.parametrize("name", OURS)
def test_every_variable_of_ours_is_a_setting_and_has_a_good_value(name: str) -> None:
    environment = SERVICES[name]["environment"]
    fields = {variable.removeprefix(PREFIX).lower(): value for variable, value in environment.items()}
    assert set(fields) <= set(Settings.model_fields)
    told = Settings(_env_file=None, **{field: value for field, value in fields.items() if value})
    assert told.redis_url is not None
    assert told.redis_url.get_secret_value().startswith("redis://valkey:6379/")
    assert told.broker_url is None
    assert told.result_backend is None


def test_the_env_file_names_every_other_variable() -> None:
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    used = {found[2] for found in VARIABLE.finditer(text) if found[2]}
    documented = set(re.findall(r"(?m)^#? ?(\w+)=", (ROOT / ".env.example").read_text(encoding="utf-8")))
    assert used <= documented


def test_a_line_in_env_turns_to_rabbitmq_and_to_postgresql() -> None:
    """The lines that .env.example gives, with the passwords that the other services have."""
    lines = dict(re.findall(r"(?m)^# (MIMOQ_\w+)=(\S+)", (ROOT / ".env.example").read_text(encoding="utf-8")))
    secrets = {"RABBITMQ_PASSWORD": "r-secret", "POSTGRES_PASSWORD": "p-secret"}
    given = {name: resolved(value, secrets) for name, value in lines.items()} | secrets
    services = read(**given)["services"]
    for name in OURS:
        environment = services[name]["environment"]
        assert environment["MIMOQ_BROKER_URL"] == "amqp://mimoq:r-secret@rabbitmq:5672//"
        assert environment["MIMOQ_RESULT_BACKEND"] == "db+postgresql+psycopg://mimoq:p-secret@postgres:5432/mimoq"
    assert services["flower"]["environment"]["CELERY_BROKER_URL"] == given["MIMOQ_BROKER_URL"]
    assert services["rabbitmq"]["environment"]["RABBITMQ_DEFAULT_PASS"] == "r-secret"
    assert services["postgres"]["environment"]["POSTGRES_PASSWORD"] == "p-secret"


def test_no_secret_stands_in_it() -> None:
    secret = re.compile("PASS|KEY|SECRET|AUTH|TOKEN")
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            assert not secret.search(variable) or value in (None, "", "true", "false", "Viewer"), variable
    assert not re.search(r"://\w+:[^$@{]+@", json.dumps(COMPOSE))


def test_the_simulator_needs_no_key_and_shares_nothing() -> None:
    service = SERVICES["simulator"]
    assert service["command"][:2] == ["serve", "--simulate"]
    assert service["env_file"] == [], "nor does it get one"
    assert f"{PREFIX}API_KEY" not in service["environment"]
    stores = {SERVICES[name]["environment"]["MIMOQ_REDIS_URL"] for name in OURS}
    assert len(stores) == 2
    port = service["command"][service["command"].index("--port") + 1]
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"], "so that the address it prints is right outside"


def test_prometheus_finds_what_is_there() -> None:
    config = yaml.safe_load((ROOT / "ops/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    found = [(*lookup["names"], lookup["port"]) for job in config["scrape_configs"] for lookup in job["dns_sd_configs"]]
    base = int(SERVICES["worker"]["environment"]["MIMOQ_METRICS_PORT"])
    assert found == [
        ("api", int(SERVICES["api"]["environment"]["MIMOQ_API_PORT"])),
        *(("worker", base + place) for place in range(3)),
    ]
    assert all((ROOT / "ops/prometheus" / rules).is_file() for rules in config["rule_files"])
    for name in ("prometheus", "grafana"):
        assert SERVICES[name]["networks"] == ["default"]
    # On one network alone a name has one address, and no worker is scraped twice.
    assert "default" in SERVICES["worker"]["networks"]
