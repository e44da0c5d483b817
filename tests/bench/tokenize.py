#!/usr/bin/env python3
"""Shards to token cache, side by side: this project's pipeline with 2 threads against gzip, json and sentencepiece in 2
Python processes. They take turns in one run; the ratio counts, absolute times belong to the machine. Before anything is
timed, the ids of both must be the same, byte for byte. Also how fast windows are read out of that cache.

    python3 -m venv .scratch/venv && .scratch/venv/bin/pip install sentencepiece
    .scratch/venv/bin/python tests/bench/tokenize.py [--folder plugins/datasets/c4/corpus] [--pieces 8000] [--rounds 5]

The folder has training shards named like C4's. The tokenizer is trained by this project; Python reads its file.
"""

import argparse
import array
import gzip
import json
import multiprocessing
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
N_WORKERS = 2
SEPARATOR = "<STORY_SEP>"


def ours(program, folder, cache, pieces, tokenizer=None):
    """What the example prints, about a cache made from nothing."""
    command = [program, folder, cache, str(pieces), str(N_WORKERS)] + ([tokenizer] if tokenizer else [])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def load_tokenizer(path):
    """Once in each process."""
    global sentencepiece_processor
    import sentencepiece

    sentencepiece_processor = sentencepiece.SentencePieceProcessor(model_file=path)


def tokenize_shard(shard_and_chunk):
    shard, chunk = shard_and_chunk
    ids = array.array("h")
    with gzip.open(shard, "rt", encoding="utf-8") as lines:
        for line in lines:
            if text := json.loads(line)["text"]:
                ids.extend(sentencepiece_processor.encode(text + SEPARATOR))
    with open(chunk, "wb") as file:
        ids.tofile(file)


def python_seconds(shards, cache, tokenizer):
    """Seconds of the Python pipeline, which leaves `chunk_<i>.bin` in the folder `cache`."""
    cache.mkdir()
    start = time.perf_counter()
    with multiprocessing.Pool(N_WORKERS, load_tokenizer, (tokenizer,)) as pool:
        jobs = [(shard, cache / f"chunk_{i}.bin") for i, shard in enumerate(shards)]
        pool.map(tokenize_shard, jobs, chunksize=1)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "plugins/datasets/c4/corpus")
    parser.add_argument("--pieces", type=int, default=8000, help="vocabulary, at least 256 and below 32767")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each program")
    args = parser.parse_args()

    build = ["cargo", "build", "--release", "--quiet", "--package", "moeut-text", "--example", "tokenize"]
    subprocess.run(build, cwd=ROOT, check=True)
    program = ROOT / "target/release/examples/tokenize"
    shards = sorted(args.folder.rglob("c4-train.*.json.gz"))

    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        first = ours(program, args.folder, scratch / "ours", args.pieces)
        tokenizer = first["tokenizer"]
        python_seconds(shards, scratch / "python", tokenizer)
        for i, chunk in enumerate(first["chunks"]):
            if pathlib.Path(chunk).read_bytes() != (scratch / f"python/chunk_{i}.bin").read_bytes():
                sys.exit(f"the ids of {shards[i]} differ")
        megabytes = first["utf8_bytes"] / 1e6
        print(f"{len(shards)} shards, {megabytes:.1f} MB of text, {first['n_tokens']} ids: all the same")

        ratios, reading = [], []
        for turn in range(args.rounds):
            fresh = ours(program, args.folder, scratch / f"ours{turn}", args.pieces, tokenizer)
            other = python_seconds(shards, scratch / f"python{turn}", tokenizer)
            shutil.rmtree(scratch / f"ours{turn}")
            shutil.rmtree(scratch / f"python{turn}")
            ratios.append(other / fresh["tokenize_seconds"])
            reading.append(fresh["read_tokens_per_second"])
            print(
                f"round {turn + 1}: ours {megabytes / fresh['tokenize_seconds']:.1f} MB/s, "
                f"Python {megabytes / other:.1f} MB/s, ratio {ratios[-1]:.2f}"
            )
    print(f"tokenizing: {statistics.median(ratios):.2f} times as fast as Python (median; {min(ratios):.2f} to {max(ratios):.2f})")
    print(f"reading: {statistics.median(reading) / 1e6:.0f} M tokens/s, sequential windows of 1024 (median)")


if __name__ == "__main__":
    main()
