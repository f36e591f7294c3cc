"""Try hostile input on every parser: python tests/fuzz_campaign.py --help.

Every input is generated from a seed in its own folder and run in a fork of this process, after the
imports. A run may succeed or refuse in one line. It must not end with a traceback or a signal, take
ten seconds of a core or a gigabyte, print terminal control sequences, or open a file outside of its
folder.
"""

import argparse
import ctypes
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a fork after OpenMP has started threads would wait for them

import torch
from fuzz import documents, media, pickles, runs, weights
from fuzz.base import Attempt
from PIL import Image

from autorefiner.refiner import estimate
from autorefiner.refiner.cli import ERROR, main
from autorefiner.refiner.demo.bundle import WEIGHTS
from autorefiner.refiner.demo.metrics.classify import templates

from tiny_bundle import use_bundle, write_tiny_bundle
from tiny_command import write_files

SECONDS, WALL = 10, 60  # CPU seconds, and wall-clock seconds until an input counts as hung
BLOW_UP = 1 << 30  # bytes
FREE_BYTES = 1 << 29  # reported as free memory
# Each kind with its share of the inputs.
KINDS: dict[str, tuple[int, Callable[[Path, random.Random], Attempt]]] = {
    "safetensors": (3, weights.safetensors),
    "torch files": (3, weights.torch_files),
    "folders": (1, weights.folders),
    "latents": (1, weights.latents),
    "bundled": (1, weights.bundled),
    "pickles": (3, pickles.pickles),
    "workflows": (4, documents.workflows),
    "trainings": (2, documents.trainings),
    "arguments": (2, documents.arguments),
    "prompts": (1, documents.prompts),
    "page": (2, documents.posts),
    "pictures": (3, media.pictures),
    "videos": (2, media.videos),
    "run folders": (2, runs.run_folders),
}
STEERS = re.compile(
    rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80[\xa8-\xae]|\xe2\x81[\xa6-\xa9]"
)
FREE = (
    "/proc/",
    "/sys/",
    "/dev/",
    "/usr/",
    "/lib",
    "/etc/ld.so",
    "/etc/localtime",
    "/etc/ssl",
    "/etc/mime.types",
)


@dataclass(slots=True)
class Findings:
    """Faults by kind; the campaign passes if there are none."""

    inputs: Counter = field(default_factory=Counter)
    refused: int = 0
    faults: list[str] = field(default_factory=list)


def prepare(root: Path) -> Path:
    """Write the source files, the finished first step of a training, and a secret file."""
    pristine = root / "pristine"
    for name in (
        "input",
        "output",
        "models/diffusion_models",
        "models/vae",
        "models/text_encoders",
        "models/loras",
    ):
        (pristine / name).mkdir(parents=True)
    write_files(pristine)
    write_tiny_bundle(root / "bundle")
    use_bundle(root / "bundle")
    estimate.available_bytes = lambda device: FREE_BYTES  # so that checks of free memory refuse
    (root / "secret").mkdir()
    Image.new("RGB", (16, 16)).save(root / "secret" / "secret.png")
    clip = [
        "generate",
        "--model",
        "sprites",
        "--prompt",
        "a red star",
        "--frames",
        "5",
        "--device",
        "cpu",
    ]
    main([*clip, "--out", str(pristine / "clip.mp4")])
    shutil.copy(pristine / "clip.mp4", root / "secret" / "secret.mp4")
    Image.new("RGB", (64, 64)).save(pristine / "input" / "example.png")
    for steps in (1, 2):
        (pristine / "run.toml").write_text(documents.training("run", steps))
        if steps == 1:
            main(["train", str(pristine / "run.toml"), "--device", "cpu"])
    templates()
    return pristine


class Watch:
    """Linux's inotify on a folder that must not be touched."""

    # Opened, written, changed, moved, created, deleted.
    EVENTS = 0x20 | 0x2 | 0x4 | 0x40 | 0x80 | 0x100 | 0x200

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None)
        self.descriptor = libc.inotify_init1(os.O_NONBLOCK)
        libc.inotify_add_watch(self.descriptor, os.fsencode(folder), self.EVENTS)

    def touched(self) -> bool:
        """Return whether anything was opened or changed since the last call."""
        try:
            return bool(os.read(self.descriptor, 1 << 16))
        except BlockingIOError:
            return False


def forbid_outside(folder: Path, report: Callable[[str], None]) -> None:
    """Report every file that Python opens outside of `folder`, the system and Python itself."""
    pack = Path(__file__).parents[1]
    allowed = (
        str(folder.parent / "bundle"),
        str(folder),
        str(WEIGHTS),
        str(pack),
        sys.prefix,
        sys.base_prefix,
        *FREE,
    )

    def hook(event: str, arguments: tuple) -> None:
        if event in ("open", "os.remove", "os.rename", "os.mkdir", "os.rmdir") and isinstance(
            arguments[0], (str, bytes)
        ):
            path = os.path.realpath(os.path.join(folder, os.fsdecode(arguments[0])))
            if not path.startswith(allowed):
                report(f"{event} {path}")
        elif event in ("os.system", "subprocess.Popen", "socket.connect", "os.exec"):
            report(f"{event} {arguments!r}")

    sys.addaudithook(hook)


def child(
    make: Callable[[Path, random.Random], Attempt],
    folder: Path,
    choose: random.Random,
    outside: bool,
) -> int:
    """Generate and run an input; return 0 for success, 2 for a one-line refusal, else 1."""
    attempt = make(folder, choose)
    print(f"input: {attempt.name!r}", file=sys.stderr, flush=True)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    if not outside:
        forbid_outside(folder, lambda what: os.write(3, what.encode(errors="replace") + b"\n"))
    try:
        attempt.act()
    except (ValueError, OSError) as error:
        if "\n" in str(error).strip():
            traceback.print_exc()
            return 1
        return 2
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def forked(
    make: Callable, folder: Path, choose: random.Random, outside: bool
) -> tuple[int, resource.struct_rusage, float]:
    """Run `child` in a fork; return its exit status, resource usage and wall-clock seconds."""
    began = time.perf_counter()
    pid = os.fork()
    if not pid:
        os.setsid()
        for number, name in ((1, "stdout"), (2, "stderr"), (3, "outside")):
            os.dup2(
                os.open(
                    folder.with_name(f"{folder.name}.{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                ),
                number,
            )
        os.chdir(folder)
        status = 1
        try:
            status = child(make, folder, choose, outside)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    while (ended := os.wait4(pid, os.WNOHANG))[0] == 0:
        if time.perf_counter() - began > WALL:
            os.killpg(pid, signal.SIGKILL)
            ended = os.wait4(pid, 0)
            break
        time.sleep(0.005)
    return ended[1], ended[2], time.perf_counter() - began


def judge(
    status: int, used: resource.struct_rusage, seconds: float, base_kb: int, folder: Path
) -> list[str]:
    """Return the faults of a run."""
    out, err, outside = (
        folder.with_name(f"{folder.name}.{name}").read_bytes()
        for name in ("stdout", "stderr", "outside")
    )
    faults = []
    if os.WIFSIGNALED(status):
        late = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        faults.append("hang" if late else f"signal {os.WTERMSIG(status)}")
    elif os.WEXITSTATUS(status) not in (0, 2) or b"Traceback (most" in err:
        faults.append("traceback")
    elif err.count(ERROR.encode()) > 1:
        faults.append("several errors")
    if seconds > WALL:
        faults.append("hang")
    if (used.ru_maxrss - base_kb) * 1024 > BLOW_UP:
        faults.append(f"blow-up of {(used.ru_maxrss - base_kb) >> 10} MiB")
    if outside:
        faults.append(f"outside: {outside.decode(errors='replace').splitlines()[0]}")
    # Progress bars may move the cursor up a line.
    if STEERS.search(out) or STEERS.search(err.replace(b"\x1b[A", b"")):
        faults.append("steers the terminal")
    return faults


def forked_kb() -> int:
    """Return the memory in kB that every fork starts with: this process's without mapped files."""
    if not (pid := os.fork()):
        os._exit(0)
    return os.wait4(pid, 0)[2].ru_maxrss


def work(numbers: range, args: argparse.Namespace, root: Path, pristine: Path) -> Findings:
    """Try the inputs with these numbers, one after the other."""
    findings, watch = Findings(), Watch(root / "secret")
    plan = [
        kind
        for kind, (share, _) in KINDS.items()
        for _ in range(share)
        if args.only in (None, kind)
    ]
    deadline = time.monotonic() + 60 * args.minutes
    for number in numbers:
        if time.monotonic() > deadline:
            break
        kind = plan[number % len(plan)]
        folder = root / f"input_{number}"
        shutil.copytree(pristine, folder)
        choose = random.Random(f"{args.seed}/{kind}/{number}")
        base_kb = forked_kb()
        status, used, seconds = forked(KINDS[kind][1], folder, choose, kind == "arguments")
        faults = judge(status, used, seconds, base_kb, folder)
        if watch.touched():
            faults.append("outside: the untouched folder")
        if (folder / "ran").exists():
            faults.append("code was run")
        findings.inputs[kind] += 1
        findings.refused += os.WIFEXITED(status) and os.WEXITSTATUS(status) == 2
        if faults:
            errors = folder.with_name(f"{folder.name}.stderr").read_bytes()
            lines = errors.decode(errors="replace").strip().splitlines() or [""]
            text = f"{kind} {number}: {', '.join(faults)}: {lines[0]!a}: {lines[-1]!a}"
            findings.faults.append(text)
            print(text[:600], flush=True)
        if not (faults and args.keep):
            shutil.rmtree(folder, ignore_errors=True)
            for name in ("stdout", "stderr", "outside"):
                folder.with_name(f"{folder.name}.{name}").unlink(missing_ok=True)
    return findings


def campaign(args: argparse.Namespace) -> int:
    """Split the inputs among processes; return 1 if any of them has a fault."""
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="fuzz_"))
    pristine = prepare(root)
    print(f"seed {args.seed}, in {root}", flush=True)
    workers = {}
    for worker in range(1 if args.number is not None else args.workers):
        results = root / f"worker_{worker}.json"
        if not (pid := os.fork()):
            numbers = (
                range(worker, args.inputs, args.workers) if args.number is None else (args.number,)
            )
            findings = work(numbers, args, root, pristine)
            results.write_text(json.dumps([findings.inputs, findings.refused, findings.faults]))
            os._exit(0)
        workers[pid] = results
    for pid in workers:
        os.waitpid(pid, 0)
    status = report([json.loads(results.read_text()) for results in workers.values()])
    if not args.keep:
        shutil.rmtree(root)
    return status


def report(results: list) -> int:
    """Print the counts and the faults; return the exit status."""
    inputs, refused, faults = Counter(), 0, []
    for tried, refusals, wrong in results:
        inputs.update(tried)
        refused += refusals
        faults += wrong
    for kind, count in inputs.items():
        print(f"{kind:<16}{count:6}")
    print(f"{sum(inputs.values())} inputs, {refused} refused in one line, {len(faults)} faults")
    return 1 if faults or not inputs else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=12, help="at most (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, help="one kind of input")
    parser.add_argument("--number", type=int, help="one input, whose files stay")
    parser.add_argument(
        "--keep", action="store_true", help="keep the files of inputs that met a fault"
    )
    args = parser.parse_args()
    args.keep = args.keep or args.number is not None
    return args


if __name__ == "__main__":
    sys.exit(campaign(parse_arguments()))
