#!/usr/bin/env python3
"""Training steps side by side: this project's `dense` model against the same model in PyTorch eager, and `moeut` against
`dense` of equal multiply-accumulates. Ratios of programs that take turns in one run; absolute times belong to the machine.

    python3 tests/bench/step.py [--rounds 5] [--steps 20] [--threads 2]

Needs `cargo xtask build` and, for the first ratio, a Python that can `import torch` (the full wheel set, 4.6 GB); without
it that ratio is left out, and the output says so.
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOST = ROOT / "target/release/moeut-host"

# One shape for all: large enough that matrix products dominate, small enough for a laptop.
VOCAB, SEQ_LEN, BATCH, D_MODEL, N_LAYERS, N_HEADS, FF_MULTIPLIER = 2000, 256, 8, 256, 4, 4, 4
# The program gathers its statistics at these steps, as a usual run does.
LOG_INTERVAL = WARMUP_STEPS = 20

SHARED_FLAGS = {
    "task": "moeut_c4", "data.source": "embedded", "sentencepiece.n_pieces": VOCAB, "lm.unroll": SEQ_LEN,
    "lm.eval.enabled": 0,
    "batch_size": BATCH, "state_size": D_MODEL, "transformer.encoder_n_layers": N_LAYERS,
    "transformer.n_heads": N_HEADS, "lm.trafo.context_blocks": 0, "lr": 1e-4, "wd": 0.01, "grad_clip": 0.25,
    "seed": 1, "gpu": "none", "log_interval": LOG_INTERVAL,
}
DENSE = {"transformer.variant": "preln_rope", "transformer.ff_multiplier": FF_MULTIPLIER}
# 8 of 32 experts of 128: the hidden width 1024 that a token uses is the dense one. Attention is dense in both, and the
# router adds 3 % to the feed-forward products.
MOE = {
    "transformer.variant": "preln_moe", "moe.n_experts": 32, "moe.expert_size": D_MODEL * FF_MULTIPLIER // 8,
    "pkm.n_heads": 8, "moe.att.enable": 0,
}


def host_step_seconds(flags, n_steps, threads, folder):
    """Seconds per step of the real program's training loop."""
    flags = {**SHARED_FLAGS, **flags, "threads": threads, "warmup": WARMUP_STEPS, "rounds": 1, "calls": n_steps}
    command = [str(HOST), "bench", "step", "--json"]
    command += [word for flag, value in flags.items() for word in (f"-{flag}", str(value))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)["rows"][0]["seconds"]["median"]


def torch_trainer(threads):
    """A function that runs steps of the dense model in PyTorch eager and returns seconds per step, or None."""
    try:
        import torch
    except ImportError:
        return None
    from torch import nn
    from torch.nn import functional

    torch.set_num_threads(threads)
    torch.manual_seed(1)
    d_head, rotated = D_MODEL // N_HEADS, D_MODEL // N_HEADS // 2
    angles = torch.arange(SEQ_LEN)[:, None] * 10000.0 ** (-torch.arange(0, rotated, 2) / rotated)
    cos, sin = angles.cos()[None, None], angles.sin()[None, None]

    def rope(x):
        first, second, rest = x.split([rotated // 2, rotated // 2, d_head - rotated], dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)
            self.kv = nn.Linear(D_MODEL, 2 * D_MODEL, bias=False)
            self.q = nn.Linear(D_MODEL, D_MODEL, bias=False)
            self.out = nn.Linear(D_MODEL, D_MODEL, bias=False)
            self.up = nn.Linear(D_MODEL, FF_MULTIPLIER * D_MODEL)
            self.down = nn.Linear(FF_MULTIPLIER * D_MODEL, D_MODEL)

        def forward(self, x):
            heads = lambda y: y.view(BATCH, SEQ_LEN, N_HEADS, d_head).transpose(1, 2)
            y = self.norm1(x)
            k, v = self.kv(y).chunk(2, dim=-1)
            mixed = functional.scaled_dot_product_attention(rope(heads(self.q(y))), rope(heads(k)), heads(v), is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(BATCH, SEQ_LEN, D_MODEL))
            return x + self.down(functional.relu(self.up(self.norm2(x))))

    model = nn.Sequential(
        nn.Embedding(VOCAB, D_MODEL), *(Layer() for _ in range(N_LAYERS)), nn.LayerNorm(D_MODEL), nn.Linear(D_MODEL, VOCAB)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    tokens = torch.randint(VOCAB, (64, BATCH, SEQ_LEN + 1))

    def run(n_steps):
        start = 0.0
        for step in range(WARMUP_STEPS + n_steps):
            if step == WARMUP_STEPS:
                start = time.perf_counter()
            batch = tokens[step % len(tokens)]
            loss = functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
            if not math.isfinite(loss.item()):
                sys.exit("PyTorch's loss is not finite")
        return (time.perf_counter() - start) / n_steps

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each program")
    parser.add_argument("--steps", type=int, default=20, help="measured steps per turn, a multiple of 20")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.steps % LOG_INTERVAL or options.steps < 1:
        parser.error(f"--steps is {options.steps}; it must be a multiple of {LOG_INTERVAL}, for instance 40")
    if not HOST.exists():
        sys.exit(f"{HOST} is missing: type `cargo xtask build`")

    with tempfile.TemporaryDirectory() as folder:
        programs = {
            "dense": lambda n: host_step_seconds(DENSE, n, options.threads, folder),
            "moeut": lambda n: host_step_seconds(MOE, n, options.threads, folder),
        }
        torch_run = torch_trainer(options.threads)
        if torch_run:
            programs["PyTorch eager"] = torch_run
        else:
            print("PyTorch cannot be imported: its ratio is left out")
        seconds = {name: [] for name in programs}
        for turn in range(options.rounds + 1):
            for name, program in programs.items():
                took = program(options.steps)
                if turn > 0:  # The first turn fills caches.
                    seconds[name].append(took)

    median = {name: statistics.median(all_) for name, all_ in seconds.items()}
    for name, all_ in seconds.items():
        print(f"{name:14} {1e3 * median[name]:8.1f} ms per step ({1e3 * min(all_):.1f} to {1e3 * max(all_):.1f}, {len(all_)} turns)")
    if "PyTorch eager" in median:
        print(f"dense / PyTorch eager: {median['dense'] / median['PyTorch eager']:.3f} (goal: at most 1)")
    print(f"moeut / dense of equal multiply-accumulates: {median['moeut'] / median['dense']:.3f} (goal: at most 1.3)")


if __name__ == "__main__":
    main()
