#!/bin/sh
# Starts the program of its own name with libtorch: the one in this folder, `$LIBTORCH`, or that of the Python on the search path.
set -u
self=$(readlink -f -- "$0")
root=$(dirname -- "$self")
version=@LIBTORCH@

# A wheel has its version in version.py, an archive of libtorch in build-version.
is_right() {
    [ -e "$1/lib/libtorch_cpu.so" ] || return 1
    cat "$1/version.py" "$1/build-version" 2>/dev/null | grep -q "$version"
}

if [ ! -e "$root/.libtorch/torch/lib/libtorch_cpu.so" ]; then
    found=
    for folder in "${LIBTORCH:-}" \
        "$(python3 -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])' 2>/dev/null)"; do
        if [ -n "$folder" ] && is_right "$folder"; then
            found=$folder
            break
        fi
    done
    if [ -z "$found" ]; then
        cat >&2 <<END
Error: libtorch $version is not found
  why: it is neither in \`$root/.libtorch\`, nor where \$LIBTORCH says (\`${LIBTORCH:-}\`), nor in the Python on the search path
  help: python3 -m pip install torch==$version, or export LIBTORCH=<folder with lib/libtorch_cpu.so>
END
        exit 2
    fi
    LD_LIBRARY_PATH=$found/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export LD_LIBRARY_PATH
fi
exec "$root/lib/bin/$(basename -- "$self")" "$@"
