# Sourced by the scripts beside it: leaves a Python with the given requirements first on PATH.
# Makes .venv unless a virtual environment is active; installs again only when the requirements changed.

ensure_environment() {
    local requirements=$1 mark
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        if ! [ -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
            local python=${PYTHON:-python3}
            if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
                echo "error: $python is missing or older than 3.10; install Python 3.10 or newer, or name one with PYTHON=..." >&2
                return 2
            fi
            echo "making the virtual environment .venv"
            if ! "$python" -m venv .venv; then
                echo "error: $python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
                return 2
            fi
        fi
        # shellcheck disable=SC1091
        . .venv/bin/activate
    fi
    mark="$VIRTUAL_ENV/.installed-$(cat requirements*.txt | cksum | cut -d ' ' -f 1)-$requirements"
    if ! [ -e "$mark" ]; then
        echo "installing $requirements (the first time takes some minutes: torch is large)"
        python -m pip install --quiet --disable-pip-version-check -r "$requirements" || {
            echo "error: pip could not install $requirements; the lines above say why" >&2
            return 1
        }
        touch "$mark"
    fi
}
