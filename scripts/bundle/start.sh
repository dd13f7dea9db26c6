#!/bin/sh
# Linux: sh start.sh. The newest Python that the packages here are made for, else what is called python3.
here=$(cd "$(dirname "$0")" && pwd)
for folder in "$here"/packages/*-py*; do
    python=python${folder##*-py}
    command -v "$python" >/dev/null 2>&1 && "$python" -B "$here/start.py" --fits >/dev/null 2>&1 && exec "$python" -B "$here/start.py" "$@"
done
command -v python3 >/dev/null 2>&1 && exec python3 -B "$here/start.py" "$@"
echo "error: no Python here; install Python 3.11 or newer, then start this again. Nothing was installed" >&2
exit 1
