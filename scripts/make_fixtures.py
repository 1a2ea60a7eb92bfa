#!/usr/bin/env python
"""Writes the tiny checkpoints and reference values that the tests read.

    pip install -r scripts/requirements-oracle.txt       (a separate environment: transformers is only the oracle)
    python scripts/make_fixtures.py                      everything
    python scripts/make_fixtures.py llama-gqa rope       some of them
    python scripts/make_fixtures.py --list

Everything is seeded: on one machine the files come out byte for byte the same. Another CPU may differ in the last bits
of the logits, far inside the tests' tolerance. A case is refused here, not in the tests, when its greedy choices are
too close to call or when a wrong reading of one of its config values would not show in its logits.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import fixtures_families
import fixtures_llama
import fixtures_model
import fixtures_mxfp4
import fixtures_quantized
import fixtures_rope
import fixtures_tokenizers
from fixtures_case import Case
from fixtures_files import RECIPE, add_eos, write_checkpoint, write_json
from safetensors.numpy import save_file

TESTS = Path(__file__).resolve().parent.parent / "tests"
TABLES = {"fixtures": fixtures_llama.CASES, "fixtures_families": fixtures_families.CASES}


def make(case: Case, directory: Path) -> None:
    """One directory, from nothing: weights, files, then the reference from the files as transformers reads them."""
    model = fixtures_model.build(case.config)

    def prepare(seed: int) -> None:
        fixtures_model.fill(model, case, seed)
        if is_mxfp4(case):
            fixtures_mxfp4.quantize_model(model)
        elif case.quantization is not None:
            fixtures_quantized.quantize_model(case, model)

    seed = fixtures_model.find_seed(case, model, prepare)
    asked = fixtures_model.prompts(model.config, seed)
    write_checkpoint(case, model, directory)
    if case.quantization is None:
        back = fixtures_model.read_back(directory)
    elif is_mxfp4(case):
        back = fixtures_mxfp4.write_and_read_back(case, directory)
    else:
        original = fixtures_model.build(case.config)
        fixtures_model.fill(original, case, seed)
        back = fixtures_quantized.write_and_read_back(case, dict(original.named_parameters()), directory)
    expected = fixtures_model.reference(back, case, asked)
    moved = fixtures_model.sensitivity(case, model, asked, expected.logits)
    if fixtures_model.furthest(model, asked, expected.logits) > 1e-4:
        raise SystemExit(f"{case.name}: the files do not give the model's logits back")
    arrays = {f"logits.{name}": value for name, value in expected.logits.items()}
    save_file(arrays, directory / "expected.safetensors")
    content = {
        "recipe": {**RECIPE, "case": case.name, "seed": seed},
        "note": case.note,
        "storage": case.storage,
        "prompts": asked,
        "greedy": expected.greedy,
        "greedy_margin": round(expected.margin, 4),
        "logits_std": {name: round(float(value.std()), 4) for name, value in expected.logits.items()},
        "sensitivity": {k: round(v, 3) if isinstance(v, float) else v for k, v in sorted(moved.items())},
    }
    if case.rope_by_length:
        content["greedy_uncached"] = expected.greedy_uncached
    write_json(directory / "expected.json", content)
    if case.tokenizer is not None:
        fixtures_tokenizers.write(case.tokenizer, directory, expect_text=case.expect_text)
    if case.eos_at is not None:
        add_eos(directory, expected.greedy["short"][case.eos_at])


def is_mxfp4(case: Case) -> bool:
    return case.quantization is not None and case.quantization.get("quant_method") == "mxfp4"


def replace(case: Case, target: Path) -> int:
    """Makes the case beside its place and moves it in; the size of its files."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / case.name
        made.mkdir()
        make(case, made)
        for path in made.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # the safetensors writer makes files private
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(made, target)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases, a prefix ending in -, or `rope`; default: all")
    parser.add_argument("--out", type=Path, default=TESTS, help="the tests directory to write under")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args()
    fixtures_model.quiet()
    known = {case.name: (folder, case) for folder, cases in TABLES.items() for case in cases}
    if options.list:
        print("\n".join([*known, "rope"]))
        return
    wanted = [name for name in [*known, "rope"] if not options.names or asked_for(name, options.names)]
    if not wanted:
        sys.exit(f"no fixture is called {' '.join(options.names)}; --list shows the names")
    for name in wanted:
        start = time.monotonic()
        if name == "rope":
            size = fixtures_rope.write(options.out / "data" / "rope_reference.json")
        else:
            folder, case = known[name]
            size = replace(case, options.out / folder / name)
        print(f"{name:40s} {size / 1000:7.1f} kB {time.monotonic() - start:6.1f} s", flush=True)


def asked_for(name: str, patterns: list[str]) -> bool:
    return any(name == pattern or (pattern.endswith("-") and name.startswith(pattern)) for pattern in patterns)


if __name__ == "__main__":
    main()
