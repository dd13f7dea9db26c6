#!/bin/sh
# macOS: a double click in the Finder. (If it says "cannot be opened": right click, Open.)
exec sh "$(dirname "$0")/start.sh" "$@"
