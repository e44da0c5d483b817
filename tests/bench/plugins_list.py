#!/usr/bin/env python3
"""`plugins list` of a folder with many plugins: of files that nobody has opened before, and of known ones. They take
turns; beside each time that passed is the time of the processor, which other work on the machine changes less. Also what
the program costs without a single plugin, most of it the start of libtorch.

    cargo xtask build && python3 tests/bench/plugins_list.py [--plugins 500] [--rounds 5]

The files are copies of one task with different version numbers, so that no two are the same. With them the program lists
those beside it.
"""

import argparse
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import tempfile
import time

BUILT = pathlib.Path(__file__).resolve().parents[2] / "target/release"
TASK = BUILT / "plugins/libmoeut_task_moeut_c4.so"
VERSION = b'"version":"0.1.0","libtorch"'
# Younger files are not remembered.
SETTLED_SECONDS = 4


def make(folder, n_plugins):
    """Copies of the task, each of a version of its own."""
    bytes_of_task = TASK.read_bytes()
    assert bytes_of_task.count(VERSION) == 1, f"{TASK} has another version by now"
    folder.mkdir()
    for number in range(n_plugins):
        version = ".".join(f"{number:03}")
        path = folder / f"libtask_{number:03}.so"
        path.write_bytes(bytes_of_task.replace(VERSION, VERSION.replace(b"0.1.0", version.encode())))
        path.chmod(0o755)


def timed(program, args, home):
    """Wall and processor seconds, and lines of output."""
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
    environment |= {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([program, *args], env=environment, cwd=home, capture_output=True, text=True, check=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, processor, len(done.stdout.splitlines())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugins", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=BUILT.parent) as scratch:
        scratch = pathlib.Path(scratch)
        scratch.chmod(0o755)
        folder, home, alone = scratch / "many", scratch / "home", scratch / "alone"
        make(folder, options.plugins)
        home.mkdir()
        alone.mkdir()
        shutil.copy2(BUILT / "moeut-host", alone / "moeut-host")
        os.environ.setdefault("LD_LIBRARY_PATH", str(BUILT.parents[1] / ".libtorch/torch/lib"))
        time.sleep(SETTLED_SECONDS)
        listing = ["plugins", "list", "-plugin_dir", str(folder)]
        found = {"without plugins": [], "opened": [], "known": []}
        for _ in range(options.rounds):
            shutil.rmtree(home / ".cache", ignore_errors=True)
            found["without plugins"].append(timed(alone / "moeut-host", ["plugins", "list"], home))
            found["opened"].append(timed(BUILT / "moeut-host", listing, home))
            assert (home / ".cache/moeut/plugins.json").is_file(), "nothing was remembered"
            found["known"].append(timed(BUILT / "moeut-host", listing, home))
    for name, rounds in found.items():
        seconds, processor, lines = (statistics.median(column) for column in zip(*rounds))
        print(f"{name:16} {seconds:.2f} s, of the processor {processor:.2f} s, {lines} lines")


if __name__ == "__main__":
    main()
