#!/usr/bin/env python3
"""The speed table of one GPU: training steps, layers of every kernel, attention and reading of data, by `moeut-host bench`,
with what the Python reference and others reached on an H100, and the goals.

    python3 tests/bench/table.py [--out tests/bench/results] [--smoke]

Needs `cargo xtask build`, or `--host <program>` with its plugins beside it, and the sweeps of this repository; no data and no
network: the text is the corpus that the dataset `c4` embeds. Writes `<device>.md` and `<device>.json`, the raw results. A
measurement that fails is named in the table, and the others go on; the exit code is 1 then. `--smoke` does the same with tiny
models on the CPU.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
SWEEPS = ROOT / "sweeps"

# One H100 80GB, torch 2.11, bf16, 64 sequences of 1024 tokens a step. `reference` is the Python code as its authors run it,
# `others` the best that its user gets by stripping logs and compiling layers, `goal` is ours; tokens/s in thousands, GB.
# Rows that matter most come first: when time is up, the last ones are left out.
MIXED = {"moe.router_dtype": "mixed"}
STEPS = [
    {"name": "MoEUT 244M", "sweep": "slimpajama_moeut_big_matched_rope_noln", "more": MIXED,
     "reference": 49.2, "reference_gb": 47.6, "others": 84.3, "goal": 300, "goal_gb": 20},
    {"name": "dense 244M", "sweep": "slimpajama_baseline_big_rope_nodrop", "more": {},
     "reference": 108, "reference_gb": 53.2, "goal": 320, "goal_gb": 20},
    {"name": "dense 244M, d_ff 4112", "sweep": "slimpajama_baseline_big_rope_nodrop",
     "more": {"transformer.ff_multiplier": 4.016}, "others": 222.4, "goal": 320, "goal_gb": 20},
    {"name": "MoEUT 44M", "sweep": "c4_moeut_small_matched_rope_noln_long", "more": MIXED,
     "reference": 55.8, "reference_gb": 43.3, "others": 101.6, "goal": 500},
    {"name": "dense 44M", "sweep": "c4_baseline_small_rope_long_nodrop", "more": {},
     "reference": 91.6, "reference_gb": 73.7, "others": 223, "goal": 500},
    {"name": "MoEUT 1B, 4 microbatches", "sweep": "c4_moeut_1b_switchead", "more": {**MIXED, "n_microbatch": 4},
     "reference": 13.4, "reference_gb": 49.1, "goal": 60, "rounds": 3, "calls": 2},
    {"name": "SUT 44M, 2 microbatches", "sweep": "c4_small_sut_lowreg2_fixed_44m", "more": {},
     "reference": 32.1, "reference_gb": 49.1, "goal": 100, "rounds": 3, "calls": 3},
    {"name": "MoEUT 244M, f32 routers", "sweep": "slimpajama_moeut_big_matched_rope_noln", "more": {},
     "reference": 49.2, "reference_gb": 47.6, "others": 84.3, "goal": 300, "goal_gb": 20},
    {"name": "MoEUT 244M, sums in one order", "sweep": "slimpajama_moeut_big_matched_rope_noln", "more": {**MIXED, "deterministic": 1},
     "reference": 49.2, "reference_gb": 47.6, "others": 84.3, "goal": 300, "goal_gb": 20},
    {"name": "MoEUT 244M, recomputed", "sweep": "slimpajama_moeut_big_matched_rope_noln",
     "more": {**MIXED, "transformer.recompute": 1}, "reference": 49.2, "reference_gb": 47.6, "goal_gb": 20},
    {"name": "dense 244M, recomputed", "sweep": "slimpajama_baseline_big_rope_nodrop", "more": {"transformer.recompute": 1},
     "reference": 108, "reference_gb": 53.2, "goal_gb": 20},
    {"name": "MoEUT 244M, recomputed where cheap", "sweep": "slimpajama_moeut_big_matched_rope_noln",
     "more": {**MIXED, "transformer.recompute": "cheap"}, "reference": 49.2, "reference_gb": 47.6, "goal_gb": 20},
    {"name": "dense 244M, recomputed where cheap", "sweep": "slimpajama_baseline_big_rope_nodrop",
     "more": {"transformer.recompute": "cheap"}, "reference": 108, "reference_gb": 53.2, "goal_gb": 20},
    {"name": "MoEUT 1B, CUDA graphs", "sweep": "c4_moeut_1b_switchead",
     "more": {**MIXED, "n_microbatch": 4, "cuda_graphs": 1}, "reference": 13.4, "reference_gb": 49.1, "goal": 60,
     "rounds": 3, "calls": 2},
    {"name": "SUT 44M, CUDA graphs", "sweep": "c4_small_sut_lowreg2_fixed_44m", "more": {"cuda_graphs": 1},
     "reference": 32.1, "reference_gb": 49.1, "goal": 100, "rounds": 3, "calls": 3},
]
# σ-MoE forward and backward, ms: the reference, the best of ScatterMoE and libtorch's grouped product, our prototype in
# Triton in its repeatable form, equal dense work, and the goals for sums in any order and, for 244M, in one.
LAYERS = {
    "244M σ-MoE": {"reference": 27.04, "others": 14.73, "prototype": 6.65, "dense": 2.95, "goal": 4.5, "goal_in_order": 5.0},
    "1B σ-MoE": {"reference": 16.30, "others": 8.97, "prototype": 4.09, "dense": 1.49, "goal": 2.9},
    "44M σ-MoE": {"reference": 20.48, "others": 5.86, "prototype": 2.30, "dense": 1.31, "goal": 1.6},
}
# Every model small enough for a CPU, in which all that the models of the table do happens.
SMOKE = {
    "gpu": "none", "state_size": 32, "batch_size": 4, "lm.unroll": 32, "transformer.encoder_n_layers": 4,
    "transformer.head_projection_size": 16, "transformer.n_heads": 2, "moe.n_experts": 24, "moe.expert_size": 16,
    "sentencepiece.n_pieces": 500,
}


class Bench:
    """Runs `moeut-host`, and keeps what it said."""

    def __init__(self, host, work, budget):
        self.host, self.work = host, work
        self.deadline = time.monotonic() + budget
        self.reports, self.failures, self.seconds = [], [], {}

    def host_json(self, words, limit):
        """The JSON that a command prints, or an exception with what it said instead."""
        done = subprocess.run([str(self.host), *words], cwd=self.work, capture_output=True, text=True, timeout=limit)
        if done.returncode != 0:
            raise RuntimeError(" ".join((done.stderr.strip() or f"ended with {done.returncode}").split()))
        return json.loads(done.stdout)

    def measure(self, name, words):
        """A report, or nothing if it failed or there is no time left."""
        left = self.deadline - time.monotonic()
        start = time.monotonic()
        try:
            if left < 5:
                raise RuntimeError("no time was left")
            report = self.host_json(["bench", *words(), "--json"], left)
        except subprocess.TimeoutExpired:
            self.failures.append((name, f"did not end within {left:.0f} s, when time was up"))
        except (RuntimeError, OSError, json.JSONDecodeError) as error:
            self.failures.append((name, str(error)))
        else:
            self.seconds[name] = time.monotonic() - start
            print(f"{name}: {self.seconds[name]:.0f} s", file=sys.stderr)
            self.reports.append({"name": name, **report})
            return report
        print(f"{name}: {self.failures[-1][1]}", file=sys.stderr)
        return None


def flags(arguments):
    return [f"-{name}={value}" for name, value in arguments.items()]


def effort(rounds, calls, warmup):
    return ["-rounds", str(rounds), "-calls", str(calls), "-warmup", str(warmup)]


def step_words(bench, row, cache, smoke):
    """The arguments of a sweep's first run, on the embedded corpus."""
    changes = {"task": "moeut_c4", "data.source": "embedded", "data.cache_dir": cache, "lm.eval.enabled": 0, **row["more"]}
    if smoke:
        changes |= SMOKE
    shown = bench.host_json(["sweep", "show", str(SWEEPS / f"{row['sweep']}.yaml"), "--json", *flags(changes)], 60)
    rounds, calls, warmup = (2, 1, 1) if smoke else (row.get("rounds", 5), row.get("calls", 4), 4 if row.get("rounds", 5) > 3 else 2)
    return ["step", *shown[0]["arguments"], *effort(rounds, calls, warmup)]


def ms(seconds):
    return f"{1e3 * seconds['median']:.3g}" if seconds["median"] < 1e-2 else f"{1e3 * seconds['median']:.1f}"


def spread(seconds):
    return f"{ms(seconds)} ({1e3 * seconds['min']:.4g} to {1e3 * seconds['max']:.4g})"


def share(row, speed, of, unit):
    return f"{row[speed]:.3g} {unit} ({100 * row[of]:.1f} %)" if speed in row else ""


def gb(row):
    return f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else ""


def ratio(ours, theirs, is_time=False):
    """How many times as fast as theirs."""
    if theirs is None:
        return ""
    return f"{theirs / ours:.2f}" if is_time else f"{ours / theirs:.2f}"


def table(titles, rows):
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def plain(number):
    return "" if number is None else f"{number:g}"


def step_table(measured):
    rows = []
    for row, report in measured:
        found = report["rows"][0]
        speed = found["tokens_per_s"] / 1e3
        rows.append([
            row["name"], spread(found["seconds"]), f"**{speed:.4g}**", share(found, "tflops_per_s", "share_of_matmul", "TFLOP/s"),
            gb(found), plain(row.get("reference")), ratio(speed, row.get("reference")), plain(row.get("reference_gb")),
            plain(row.get("others")), ratio(speed, row.get("others")), plain(row.get("goal")), ratio(speed, row.get("goal")),
            plain(row.get("goal_gb")),
        ])
    return table(
        ["model", "ms a step", "k tokens/s", "arithmetic", "peak GB", "reference, k tokens/s", "times as fast", "its GB",
         "best of others", "times as fast", "goal", "of the goal", "its GB"], rows)


def pairs(report):
    """Rows of the forward pass, each with that of both passes."""
    return zip(report["rows"][::2], report["rows"][1::2])


def layer_cells(forward, both):
    return [
        ms(forward["seconds"]), spread(both["seconds"]), share(both, "tflops_per_s", "share_of_matmul", "TFLOP/s"),
        share(both, "gb_per_s", "share_of_copy", "GB/s"), gb(both),
    ]


LAYER_TITLES = ["forward ms", "forward + backward ms", "arithmetic", "memory", "peak GB"]


def layer_table(report, in_order):
    both_reports = [(*pair, "", "goal") for pair in pairs(report)]
    if in_order:
        both_reports += [(*pair, ", sums in one order", "goal_in_order") for pair in pairs(in_order)]
    rows = []
    for forward, both, how, goal in both_reports:
        known = LAYERS.get(both["name"], {})
        took = 1e3 * both["seconds"]["median"]
        rows.append([
            both["name"], both["kernel"] + how, *layer_cells(forward, both), f"{both['error']:.1e}" if "error" in both else "",
            plain(known.get("reference")), ratio(took, known.get("reference"), True), plain(known.get("others")),
            plain(known.get("prototype")), plain(known.get("dense")), plain(known.get(goal)),
            ratio(took, known.get(goal), True),
        ])
    return table(
        ["layer", "kernel", *LAYER_TITLES, "error", "reference ms", "times as fast", "best of others ms", "prototype ms",
         "dense ms", "goal ms", "of the goal"], rows)


def attention_table(report):
    return table(["layer", *LAYER_TITLES], [[both["name"], *layer_cells(forward, both)] for forward, both in pairs(report)])


def ratio_of_models(measured):
    """Our MoEUT against our dense model, which counts once the latter is fast."""
    speed = {row["name"]: report["rows"][0]["tokens_per_s"] for row, report in measured}
    dense = max((speed[name] for name in speed if name.startswith("dense 244M")), default=None)
    if dense is None or "MoEUT 244M" not in speed:
        return ""
    return f"\nMoEUT 244M has {speed['MoEUT 244M'] / dense:.2f} times the tokens/s of the faster dense 244M (goal: 0.85, while\ndense has 222 k at least).\n"


def page(bench, measured, layers, in_order, attention, data, took, options):
    """The whole file."""
    any_report = bench.reports[0]
    machine, ceilings = any_report["machine"], [report["ceilings"] for report in bench.reports if report["bench"] != "data"]
    products = [one["matmul"]["tflops_per_s"] for one in ceilings] or [any_report["ceilings"]["matmul"]["tflops_per_s"]]
    copies = [one["copy"]["gb_per_s"] for one in ceilings] or [any_report["ceilings"]["copy"]["gb_per_s"]]
    width = any_report["ceilings"]["matmul"]["width"]
    driver = f"driver {machine['driver']}, " if "driver" in machine else ""
    text = f"""# {machine['device']} ({driver}libtorch {machine['libtorch']}), {datetime.date.today()}

Written by `tests/bench/table.py{' --smoke' if options.smoke else ''}` in {took:.0f} s. {machine['dtype']}; wall time, medians,
and the fastest and slowest round in parentheses. Shares are of a product of two {width} x {width} matrices and
of a copy, measured in the same run: {min(products):.3g} to {max(products):.3g} TFLOP/s and {min(copies):.4g} to {max(copies):.4g} GB/s.
What is compared with was measured on an H100 80GB: ratios mean something on such a card only.
"""
    if options.smoke:
        text += "\n**Tiny models on a CPU: this shows that the script works, and no speed.**\n"
    if measured:
        text += f"""
## Training steps

Arguments of the paper's sweeps on the embedded corpus, 64 sequences of 1024 tokens; MoEUT with routers in mixed precision
unless it says otherwise. A model's arithmetic is three forward passes, in which all of the attention's scores count, also
those that the causal mask hides.

{step_table(measured)}{ratio_of_models(measured)}"""
    if layers:
        text += f"""
## Layers of kernels

σ-MoE after its routing, and SwitchHead's projections of values (v) and outputs (o). Memory is what passes through it if every
operand and result does so once. The error is the largest relative distance of result and gradients from those of the
first kernel. Peaks hold inputs and gradients, too.

{layer_table(layers, in_order)}"""
    if attention:
        text += f"\n## Attention\n\nCausal, as the models call it; half of the scores count.\n\n{attention_table(attention)}"
    if data:
        row = data["rows"][0]
        text += f"\n## Reading of batches\n\n{row['tokens_per_s'] / 1e6:.4g} million tokens/s, {ms(row['seconds'])} ms a batch of {row['n_tokens']} tokens.\n"
    if bench.failures:
        text += "\n## Not measured\n\n" + "".join(f"- {name}: {why}\n" for name, why in bench.failures)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", type=pathlib.Path, default=ROOT / "target/release/moeut-host")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "tests/bench/results", help="folder of the two files")
    parser.add_argument("--cache", type=pathlib.Path, help="folder of tokenizers, tokens and kernels that is kept")
    parser.add_argument("--budget", type=float, default=450, help="seconds after which nothing new begins")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    options = parser.parse_args()
    host = options.host.resolve()
    if not os.access(host, os.X_OK):
        sys.exit(f"{host} is no program: type `cargo xtask build`, or name it with `--host`")

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        cache = str((options.cache or pathlib.Path(work) / "cache").resolve())
        bench = Bench(host, work, options.budget)
        on = ["-gpu", "none"] if options.smoke else []
        shapes = ["-shape", "tiny"] if options.smoke else ["-shape", "244M,1B,44M"]
        layer_effort = effort(2, 1, 1) if options.smoke else effort(7, 4, 3)

        measured = []

        def step(row):
            report = bench.measure(row["name"], lambda: step_words(bench, row, cache, options.smoke))
            if report:
                measured.append((row, report))

        for row in STEPS[:2]:
            step(row)
        kernels = "grouped" if options.smoke else "grouped,cuda"
        of_kernels = ["moe", *on, "-data.cache_dir", cache, *shapes, "-kernel", kernels, *layer_effort]
        layers = bench.measure("layers", lambda: of_kernels)
        in_order = None
        if not options.smoke:
            # Only this kernel has two ways.
            of_one = [*of_kernels[:-len(layer_effort) - 1], "cuda", *layer_effort]
            in_order = bench.measure("layers, sums in one order", lambda: [*of_one, "-deterministic", "1"])
        attention = bench.measure("attention", lambda: ["attention", *on, *shapes, *layer_effort])
        for row in STEPS[2:]:
            step(row)
        data = bench.measure("data", lambda: ["data", *step_words(bench, STEPS[0], cache, options.smoke)[1:]])
        took = time.monotonic() - start
        if not bench.reports:
            sys.exit("nothing could be measured")

        device = bench.reports[0]["machine"]["device"]
        name = "smoke" if options.smoke else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{name}.json").write_text(json.dumps(bench.reports, indent=1) + "\n")
        file = options.out / f"{name}.md"
        file.write_text(page(bench, measured, layers, in_order, attention, data, took, options))
    print(f"wrote {file} after {took:.0f} s, {len(bench.failures)} failed")
    sys.exit(1 if bench.failures else 0)


if __name__ == "__main__":
    main()
