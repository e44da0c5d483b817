"""Log-probabilities of evaluation texts, by models written here once more from their equations, in NumPy and float64.

    python3 tests/numerics/scoring/expected.py <shared folder> tests/numerics/scoring

reads the parameters of two recorded runs and the first questions of each evaluation set, and writes a file of numbers for
each model, which `tests/scoring.rs` compares with what the host computes. No text is in them. Everything that the host
does by itself is done here in another way: texts are read and cleaned, each sequence goes through the model alone and whole,
without batches, padding or caches.

A token is a byte of UTF-8 modulo the vocabulary. So that the files stay small, only the last bytes of a prefix and the
first of an option count, see `cut`.
"""

import io
import json
import re
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np

N_ITEMS = 50
N_PREFIX, N_OPTION, N_ALONE = 24, 12, 36


def read_safetensors(path):
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    tensors = {}
    for name, info in json.loads(data[8 : 8 + n]).items():
        kind = {"F32": "<f4", "I64": "<i8", "I32": "<i4"}.get(info.get("dtype"))
        if kind:
            first, last = info["data_offsets"]
            array = np.frombuffer(data[8 + n + first : 8 + n + last], kind)
            tensors[name] = array.reshape(info["shape"])
    return tensors


def write_safetensors(path, tensors):
    header, body = {}, b""
    for name, array in tensors.items():
        raw = array.astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def layer_norm(x, p, name):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * p[name + ".weight"] + p[name + ".bias"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def rotate(x):
    """`[T, H, d]`: the first half of the channels, in the half-split layout."""
    n = x.shape[-1] // 2
    angle = np.arange(x.shape[0])[:, None] * 10000.0 ** (-np.arange(0, n, 2) / n)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., : n // 2], x[..., n // 2 : n]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., n:]], -1)


def attend(q, k, v):
    """Causal softmax attention of `[T, H, d]`."""
    scores = np.einsum("thd,shd->hts", rotate(q), rotate(k)) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
    return np.einsum("hts,shd->thd", np.exp(log_softmax(scores)), v)


def heads(x):
    return x.reshape(len(x), 4, 8)


def dense_layer(x, p):
    a = layer_norm(x, p, "norm1")
    k, v = np.split(a @ p["self_attn.data_to_kv.weight"].T, 2, -1)
    mixed = attend(heads(a @ p["self_attn.data_to_q.weight"].T), heads(k), heads(v))
    x = x + mixed.reshape(len(x), -1) @ p["self_attn.out_proj.weight"].T
    hidden = np.maximum(layer_norm(x, p, "norm2") @ p["linear1.weight"].T + p["linear1.bias"], 0)
    return x + hidden @ p["linear2.weight"].T + p["linear2.bias"]


def gates(logits, k):
    """The `k` largest along the last axis: indices and sigmoids."""
    ids = np.argsort(-logits, -1)[..., :k]
    return ids, sigmoid(np.take_along_axis(logits, ids, -1))


def moeut_layer(x, p):
    a = layer_norm(x, p, "self_attn.norm")
    v_ids, v_gates = gates(heads_of_experts(a @ p["self_attn.selections.v"].T), 2)
    o_ids, o_gates = gates(heads_of_experts(a @ p["self_attn.selections.o"].T), 2)
    v = np.zeros((len(x), 4, 8))
    for t, h, j in np.ndindex(v_ids.shape):
        v[t, h] += v_gates[t, h, j] * (x[t] @ p["self_attn.projections.v"][h * 4 + v_ids[t, h, j]])
    mixed = attend(heads(a @ p["self_attn.projections.q"].T), heads(a @ p["self_attn.projections.k"].T), v)
    y = np.array(x)
    for t, h, j in np.ndindex(o_ids.shape):
        y[t] += o_gates[t, h, j] * (mixed[t, h] @ p["self_attn.projections.o"][h * 4 + o_ids[t, h, j]])
    ids, weights = gates(layer_norm(y, p, "pkm.norm") @ p["pkm.expert_sel"].T, 3)
    z = np.array(y)
    for t, j in np.ndindex(ids.shape):
        hidden = np.maximum(y[t] @ p["pkm.keys"][ids[t, j]], 0)
        z[t] += weights[t, j] * (hidden @ p["pkm.values"][ids[t, j]])
    return z


def heads_of_experts(x):
    return x.reshape(len(x), 4, 4)


class Model:
    def __init__(self, path, layer, order):
        self.recorded = read_safetensors(path)
        params = {k[6:]: v.astype(np.float64) for k, v in self.recorded.items() if k.startswith("param.")}
        self.params, self.layer = params, layer
        below = [f"unique_layers.{index}." for index in order]
        self.layers = [{k[len(at) :]: v for k, v in params.items() if k.startswith(at)} for at in below]

    def logits(self, ids):
        x = self.params["embedding.weight"][ids]
        for p in self.layers:
            x = self.layer(x, p)
        x = layer_norm(x, self.params, "out_norm")
        return x @ self.params["output.weight"].T + self.params["output.bias"]

    def check(self):
        """The reference's own logits are met, or this file is wrong."""
        tokens = self.recorded["input.tokens.step0"]
        for column in range(tokens.shape[1]):
            logits = self.logits(tokens[:-1, column])
            error = np.abs(logits - self.recorded["expected.logits"][:, column]).max()
            assert error < 1e-5, error

    def log_p(self, ids):
        """Of each token after the first."""
        return log_softmax(self.logits(ids[:-1]))[np.arange(len(ids) - 1), ids[1:]]


def json_lines(path, n=N_ITEMS):
    return [json.loads(line) for line in path.read_text().splitlines()[:n]]


def blimp(shared):
    with zipfile.ZipFile(shared / "data/eval/blimp/BLiMP.zip") as archive:
        names = sorted(n for n in archive.namelist() if re.fullmatch(r"(.*/)?data/[^./][^/]*\.jsonl", n))
        rows = [json.loads(line) for line in io.TextIOWrapper(archive.open(names[0]), "utf-8")]
    return [("", [row["sentence_good"], row["sentence_bad"]]) for row in rows[:N_ITEMS]]


def cbt(shared):
    def plain(text):
        for old, new in [(" '", "'"), (" n't", "n't"), ("`` ", '"'), ("''", '"')]:
            text = text.replace(old, new)
        return re.sub(r" ([:;!?,.])", r"\1", text)

    path = next((shared / "data/eval/cbt_made").rglob("cbtest_CN_test_*.txt"))
    questions = []
    for block in path.read_text().split("\n\n"):
        lines = [line.split(" ", 1)[1] for line in block.strip().split("\n") if line]
        if not lines:
            continue
        sentence, answer, options = [field for field in lines[-1].split("\t") if field]
        before, after = plain(sentence).split("XXXXX")[:2]
        others = [word for word in options.split("|") if word not in ("", answer)]
        if len(others) == 9:
            context = "".join(plain(line) + " " for line in lines[:-1])
            questions.append((context + before, [word + after for word in [answer, *others]]))
    return questions[:N_ITEMS]


def hellaswag(shared):
    def clean(text):
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\\[.*?\\]", "", text).replace("  ", " ")

    rows = json_lines(next((shared / "data/eval").rglob("hellaswag_val.jsonl")))
    return [
        (
            clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
            [" " + clean(ending) for ending in row["endings"]],
        )
        for row in rows
    ]


def piqa(shared):
    rows = json_lines(shared / "data/eval/piqa/valid.jsonl")
    return [(f"Question: {r['goal'].strip()}\nAnswer:", [" " + r["sol1"], " " + r["sol2"]]) for r in rows]


def ai2arc(shared):
    rows = json_lines(next((shared / "data/eval/arc").rglob("ARC-Easy-Test.jsonl")), 100)
    questions = [(row["question"]["stem"], [c["text"] for c in row["question"]["choices"]]) for row in rows]
    four = [question for question in questions if len(question[1]) == 4]
    return [(f"Question: {stem}\nAnswer:", [" " + o for o in options]) for stem, options in four[:N_ITEMS]]


def lambada(shared):
    rows = json_lines(next((shared / "data/eval").rglob("lambada_test.jsonl")))
    return [("", [row["text"]]) for row in rows]


def cut(prefix, option):
    tokens = [np.frombuffer(text.encode(), np.uint8).astype(int) % 100 for text in (prefix, option)]
    if len(tokens[0]) == 0:
        return tokens[0], tokens[1][-N_ALONE:]
    return tokens[0][-N_PREFIX:], tokens[1][:N_OPTION]


def main(shared, out):
    models = {
        "dense": Model(shared / "fixtures/01_dense_preln_rope.safetensors", dense_layer, [0, 1, 2, 3]),
        "moeut": Model(shared / "fixtures/04_moeut_nonorm_g2.safetensors", moeut_layer, [0, 1, 0, 1]),
    }
    sets = {make.__name__: make(shared) for make in (ai2arc, blimp, cbt, hellaswag, lambada, piqa)}
    for name, model in models.items():
        model.check()
        tensors = {}
        for set_name, questions in sets.items():
            assert len(questions) == N_ITEMS, (set_name, len(questions))
            n_options = len(questions[0][1])
            # NaN where a sequence is shorter.
            expected = np.full((N_ITEMS, n_options, N_ALONE), np.nan)
            for index, (prefix, options) in enumerate(questions):
                for number, option in enumerate(options):
                    log_p = model.log_p(np.concatenate(cut(prefix, option)))
                    expected[index, number, : len(log_p)] = log_p
            tensors[set_name] = expected
        write_safetensors(out / f"{name}.safetensors", tensors)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
