# SPDX-License-Identifier: Apache-2.0
"""Run PEFT's tests: `python -m tests.peft_suite`, in an environment of requirements.txt.

The tests come from PEFT's source distribution, which pip downloads once; after that nothing is fetched. graft has
PEFT's name, or PEFT itself runs (`--peft`). What left_out.md names runs too, and does not count: see its head.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.peft_suite import results
from tests.peft_suite.served import served

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PEFT = "0.21.2"
STANDS_FOR = "0.22.0"  # the least that transformers takes
NEEDS_A_GPU = {"test_common_gpu.py", "test_gpu_examples.py", "test_gptqmodel.py"}
QUIET = {
    **dict.fromkeys(("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS"), "1"),
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "DISABLE_TELEMETRY"), "1"),
    **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
    **dict(PYTHONHASHSEED="0", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="", WANDB_DISABLED="true"),
    **dict(TRANSFORMERS_VERBOSITY="error"),
}


def fetched(cache: Path) -> Path:
    """Return the folder of PEFT's tests and sources, made from its source distribution."""
    suite = cache / f"peft-{PEFT}"
    if suite.is_dir():
        return suite
    pip = [sys.executable, "-m", "pip", "download", "-q", f"peft=={PEFT}", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--no-build-isolation", "-d", str(cache)], check=True)
    unpacked = cache / "unpacked"
    with tarfile.open(cache / f"peft-{PEFT}.tar.gz") as archive:
        archive.extractall(unpacked, filter="data")
    made = unpacked / suite.name
    (made / "tests" / "__init__.py").touch()
    shutil.rmtree(made / "src" / "peft.egg-info", ignore_errors=True)
    said = made / "src" / f"peft-{STANDS_FOR}.dist-info"
    said.mkdir(exist_ok=True)
    (said / "METADATA").write_text(f"Metadata-Version: 2.1\nName: peft\nVersion: {STANDS_FOR}\n")
    made.rename(suite)
    return suite


def stand_ins(cache: Path, suite: Path) -> Path:
    """Return the folder of the hub's stand-ins; PEFT itself makes them."""
    hub = cache / "hub"
    if not (hub / "made").exists():
        print("making stand-ins for the models on the hub: half a minute", flush=True)
        env = {**os.environ, **QUIET, "PYTHONPATH": str(suite / "src"), "PYTHONWARNINGS": "ignore"}
        subprocess.run([sys.executable, str(HERE / "hub.py"), str(hub)], check=True, env=env, stdout=subprocess.DEVNULL)
        (hub / "made").touch()
    return hub


def run(args: argparse.Namespace, suite: Path, hub: Path, out: Path) -> bool:
    """Return True if pytest came to its end."""
    as_graft = [] if args.peft else ["-m", "graft.compat.peft"]
    path = [str(HERE), str(suite / "src") if args.peft else str(ROOT / "src")]
    inherited = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    files = sorted(f.name for f in (suite / "tests").glob("test_*.py") if f.name not in NEEDS_A_GPU)
    if args.files:
        files = [f for f in files if any(Path(f).match(pattern) for pattern in args.files)]
    if args.only:
        named = {name.partition("::")[0] for name in args.only.read_text().splitlines()}
        files = [f for f in files if f"tests/{f}" in named]
    with served(hub) as address:
        env = {**inherited, **QUIET, "PYTHONPATH": os.pathsep.join(path), "HF_HOME": str(hub), "HF_ENDPOINT": address}
        env |= {"PEFT_SUITE_OUT": str(out), "PEFT_SUITE_PART": str(args.part)}
        if args.only:
            env["PEFT_SUITE_ONLY"] = str(args.only.resolve())
        pytest = ["-m", "pytest", "-p", "plugin", "-c", os.devnull, "--rootdir", str(suite), "-q", "--tb=short"]
        pytest += ["--continue-on-collection-errors", "-W", "ignore", "-p", "no:cacheprovider", "--timeout", "300"]
        pytest += ["-n", str(args.jobs), *(["-k", args.keyword] if args.keyword else [])]
        command = [sys.executable, *as_graft, *pytest, *(f"tests/{f}" for f in files)]
        with out.with_suffix(".log").open("w") as log:
            done = subprocess.run(command, cwd=suite, env=env, stdout=log, stderr=subprocess.STDOUT)
    return done.returncode in (0, 1)  # all passed, some failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peft_suite", description=__doc__)
    parser.add_argument("--cache", type=Path, default=ROOT / ".venv-peft" / "suite", help="where PEFT's tests are kept")
    parser.add_argument("--peft", action="store_true", help="PEFT itself in graft's place")
    parser.add_argument("--files", nargs="*", metavar="PATTERN", help="'test_lora*.py' …")
    parser.add_argument("--part", type=int, default=1, metavar="N", help="one test of N: 50 takes a minute")
    parser.add_argument("--only", type=Path, help="a file with a test's name on each line")
    parser.add_argument("-k", dest="keyword")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--show", type=int, default=40, metavar="N", help="print the first N failures")
    parser.add_argument("--record", action="store_true", help="keep the numbers of a whole run, for the documentation")
    args = parser.parse_args()
    cache = args.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    suite = fetched(cache)
    hub = stand_ins(cache, suite)
    out = cache / "results.jsonl"
    out.write_text("")
    ended = run(args, suite, hub, out)
    found = results.read(out)
    print(results.told(found, args.show))
    whole = ended and args.part == 1 and not (args.files or args.only or args.keyword)
    if args.record and whole and not args.peft:
        results.record(found)
    if not ended:
        print(f"pytest broke off: {out.with_suffix('.log')}")
    return 0 if ended and found.good else 1


if __name__ == "__main__":
    sys.exit(main())
