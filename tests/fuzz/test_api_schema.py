"""The OpenAPI file against the API: whatever schemathesis makes of it, good and bad, is answered as the file says.

One API process with workers and the simulator behind it, so that calls that wait are answered. All of schemathesis' checks
are on: no 5xx, documented statuses, types and shapes, bad requests refused, good ones taken, `Allow`, tokens asked for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from jobs.requests import CHAT
from tests.integration.api_stand import api_stand, ask, ask_message, line, lines
from tests.waiting import wait_for

#: Requests that are made up for one operation, and walks through several.
EXAMPLES = 8
#: All that schemathesis may take, on a machine that is busy.
PATIENCE_S = 240.0
PHASES = ("coverage", "fuzzing", "stateful")

CONFIG = """
hooks = "tests.fuzz.schema_hooks"
request-timeout = 30.0
[phases.stateful]
max-steps = 6

# Its requests have one of several forms, told apart by the names of their fields, and the last is any object: which
# bodies are good depends on the endpoint beside them.
[[operations]]
include-path = "/v1/job-batches"
checks.positive_data_acceptance.enabled = false

# What one field may be depends on another: a file or requests inline, both of two fields or neither; a cursor must be there,
# and what may be done to a batch depends on its state.
[[operations]]
include-path-regex = "^/v1/(files|batches|messages/batches)"
checks.positive_data_acceptance.enabled = false
"""


def test_what_is_made_of_the_openapi_file(tmp_path: Path) -> None:
    with api_stand(tmp_path) as stand:
        api = stand.api()
        stand.work("bulk", "interactive", max_attempts="1")
        token = stand.token()
        client = stand.http(token)
        job = client.post("/v1/jobs?wait=60", json={"request": ask()}).json()
        batch = client.post("/v1/job-batches", json={"requests": [line(), line()]}).json()["id"]
        wait_for(lambda: client.get(f"/v1/job-batches/{batch}").json()["state"] == "finished", what="a batch's end")
        assert job["state"] == "succeeded"
        file = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", lines(line()))}).json()[
            "id"
        ]
        asked = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        files = client.post("/v1/batches", json=asked).json()["id"]
        messages = [{"custom_id": "a", "params": ask_message()}]
        message = client.post("/v1/messages/batches", json={"requests": messages}).json()["id"]
        there = {"job": job["id"], "file": file, "/v1/job-batches": batch, "/v1/batches": files}
        there["/v1/messages/batches"] = message
        config = tmp_path / "schemathesis.toml"
        config.write_text(CONFIG)
        ended = subprocess.run(
            [
                *(Path(sys.executable).with_name("schemathesis"), "--config-file", config),
                *("run", f"{api.url}/openapi.json", "--header", f"Authorization: Bearer {token}", "--no-color"),
                *("--phases", ",".join(PHASES), "--max-examples", str(EXAMPLES), "--seed", "1", "--warnings", "off"),
                *("--generation-deterministic", "--continue-on-failure"),
            ],
            cwd=tmp_path,
            env=os.environ | {"THERE": json.dumps(there), "TOKEN": token},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        operations = sum(map(len, client.get("/openapi.json").json()["paths"].values()))
        assert f"Tested: {operations}\n" in ended.stdout
        for phase in PHASES:
            assert f"✅ {phase.capitalize()}" in " ".join(ended.stdout.split())
        assert "Traceback" not in api.text
        print(ended.stdout)
