#!/usr/bin/env python3
"""Writes small models of every kind into `tests/fuzz/corpus`, for the targets to start from.

    python3 -m venv .scratch/venv && .scratch/venv/bin/pip install sentencepiece
    .scratch/venv/bin/python tests/fuzz/seeds.py
"""

import io
import itertools
import pathlib
import shutil
import tempfile

import sentencepiece

HERE = pathlib.Path(__file__).resolve().parent
SENTENCES = [f"the cat {i} sat on the mat, and ate the rat" for i in range(300)]


def main():
    models = HERE / "corpus/sentencepiece_model"
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # Two rules, one of two characters: the built-in maps are too large to be changed in interesting places.
        rules = pathlib.Path(folder) / "rules.tsv"
        rules.write_text("41\t61\n65 301\te9\n")
        kinds = {"bpe": {}, "unigram": {}, "char": {}, "word": {"hard_vocab_limit": False}}
        normalizers = ({"normalization_rule_name": "identity"}, {"normalization_rule_tsv": str(rules)})
        extras = ({}, {"user_defined_symbols": ["cat", "ca"]}, {"treat_whitespace_as_suffix": True})
        for i, (kind, normalizer, extra) in enumerate(itertools.product(kinds, normalizers, extras)):
            model = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(SENTENCES), model_writer=model, model_type=kind, vocab_size=40,
                minloglevel=2, **kinds[kind], **normalizer, **extra,
            )
            (models / f"{i}_{kind}.model").write_bytes(model.getvalue())

    json = HERE / "corpus/tokenizer_json"
    json.mkdir(exist_ok=True)
    for path in (HERE / "../../plugins/text/fixtures/tokenizer_json").glob("[bu]*.json"):
        shutil.copy(path, json)


if __name__ == "__main__":
    main()
