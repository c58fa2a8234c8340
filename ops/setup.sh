#!/bin/sh
# Makes .venv in this checkout from requirements.lock, then mimoq itself in it, editable: `make setup`.
#
# Through uv where it is on PATH, else through venv and pip. PYTHON names the interpreter; unset, it is the first of
# python3, python3.14 ... python3.11 on PATH that is 3.11 or newer.
#
# The stamp is the install's last act, so an interrupted one leaves none. Its first line names what the packages depend on
# (the place, since a moved .venv still points to the old one; the Python; the lock): another one, or a .venv that does not
# start, and all is made anew. Its second line names what mimoq's own entry depends on.
set -eu
cd "$(dirname "$0")/.."

stamp=.venv/.stamp
venv_python=.venv/bin/python

version() {
    "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null
}

# The interpreter that a candidate leads to (through shims and other venvs), if it is new enough.
resolve() {
    "$1" -c 'import sys; sys.version_info < (3, 11) and sys.exit(1); print(getattr(sys, "_base_executable", sys.executable))' \
        2>/dev/null
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        resolve "$PYTHON" && return
        echo "setup: PYTHON=$PYTHON is not a Python 3.11 or newer" >&2
        exit 1
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        resolve "$candidate" && return
    done
    echo "setup: found no Python 3.11 or newer on PATH; install one, or name it: make setup PYTHON=/path/to/python3" >&2
    exit 1
}

packages_state() {
    echo "$(pwd -P) $(version "$venv_python") $(cksum <requirements.lock)"
}

own_state() {
    cksum <pyproject.toml
}

pip_install() {
    if command -v uv >/dev/null 2>&1; then
        uv pip install --quiet --python "$venv_python" "$@"
    elif [ -e .venv/bin/pip ]; then
        PIP_USER=0 "$venv_python" -m pip --quiet --disable-pip-version-check install --no-compile "$@"
    else
        python=$(find_python)
        PIP_USER=0 "$python" -m pip --quiet --disable-pip-version-check --python "$venv_python" install --no-compile "$@"
    fi
}

# On all cores at once, which pip does on one. Else every command and worker compiles a second's worth of modules when it
# starts, again and again where Python may write no bytecode by itself (PYTHONDONTWRITEBYTECODE).
compile_all() {
    "$venv_python" -m compileall -qq -j 0 "$@" || true # some packages bring files that this Python can't read
}

wants_other_python() {
    [ -n "${PYTHON:-}" ] && [ "$(version "$PYTHON")" != "$(version "$venv_python")" ]
}

packages=$(packages_state)
if [ ! -e "$stamp" ] || [ "$(sed -n 1p "$stamp")" != "$packages" ] || wants_other_python; then
    version "$venv_python" >/dev/null || rm -rf .venv # it may be first on PATH, and hide every Python that works
    python=$(find_python)
    rm -rf .venv
    if command -v uv >/dev/null 2>&1; then
        echo "Installing into .venv with uv (Python $(version "$python")) ..."
        uv venv --quiet --python "$python" .venv
    else
        echo "Installing into .venv with pip (Python $(version "$python")); this takes a minute ..."
        # Debian's Python comes without the pip that goes into a venv; its own pip can fill one from outside.
        "$python" -m venv .venv >/dev/null 2>&1 || "$python" -m venv --clear --without-pip .venv
    fi
    pip_install --require-hashes -r requirements.lock
    compile_all .venv/lib/python3*/site-packages
    packages=$(packages_state)
elif [ "$(sed -n 2p "$stamp")" = "$(own_state)" ]; then
    exit 0
fi

rm -f "$stamp"
pip_install --no-deps --no-build-isolation -e .
compile_all jobs api producers worker ops
printf '%s\n' "$packages" "$(own_state)" >"$stamp.new"
mv "$stamp.new" "$stamp"
